"""What every retriever must do; a new one joins by giving a fixture."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mint_ray.retrievers import Document, Retriever, build_retriever
from mint_ray.retrievers.config import AnyRetriever, Bm25, Dense
from tests.retrievers.encoder import save_tiny_encoder

TEXTS = {
    "marfan": ("Marfan syndrome", "Arachnodactyly, ectopia lentis and dilatation of the aorta."),
    "noonan": ("Noonan syndrome", "Short stature, pulmonic stenosis and a webbed neck."),
    "rett": ("Rett syndrome", "Seizures, loss of speech, stereotypic movements of the hands; short stature."),
    "twin": ("Rett syndrome", "Seizures, loss of speech, stereotypic movements of the hands; short stature."),
}
DOCUMENTS = [Document(document_id=key, title=title, text=text) for key, (title, text) in TEXTS.items()]
QUERIES = [
    "A boy with arachnodactyly and ectopia lentis.",
    "A girl with seizures, who lost her speech.",
    "Short stature.",
    "A woman with a webbed neck, short stature, seizures and pulmonic stenosis. " * 4,
]


def bm25(folder: Path) -> AnyRetriever:
    return Bm25()


def dense(folder: Path) -> AnyRetriever:
    torch.set_num_threads(1)
    return Dense(model_id=str(save_tiny_encoder(folder)))


@pytest.fixture(scope="module", params=[bm25, dense], ids=lambda make: make.__name__)
def retriever(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    make: Callable[[Path], AnyRetriever] = request.param
    made = build_retriever(make(tmp_path_factory.mktemp("encoder")))
    made.index(DOCUMENTS)
    return made


def test_hits_are_known_and_distinct_and_come_best_first(retriever: Retriever) -> None:
    for hits in retriever.search(QUERIES, 3):
        ids, scores = [hit.document_id for hit in hits], [hit.score for hit in hits]
        assert 0 < len(ids) == len(set(ids)) <= 3
        assert set(ids) <= set(TEXTS)
        assert scores == sorted(scores, reverse=True)


def test_a_query_finds_the_same_in_any_batch(retriever: Retriever) -> None:
    together = retriever.search(QUERIES, 3)
    assert [retriever.search([query], 3)[0] for query in QUERIES] == together
    assert retriever.search(QUERIES[::-1], 3) == together[::-1]


def test_fewer_hits_are_the_first_of_more(retriever: Retriever) -> None:
    assert [hits[:1] for hits in retriever.search(QUERIES, 4)] == retriever.search(QUERIES, 1)


def test_a_documents_own_words_find_it_and_equals_come_in_their_order(retriever: Retriever) -> None:
    title, text = TEXTS["rett"]
    first, second = retriever.search([f"{title}\n{text}"], 2)[0]
    assert (first.document_id, second.document_id) == ("rett", "twin")
    assert first.score == second.score


def test_it_survives_pickling(retriever: Retriever) -> None:
    assert pickle.loads(pickle.dumps(retriever)).search(QUERIES, 3) == retriever.search(QUERIES, 3)  # noqa: S301


def test_what_it_reads_has_an_identity(retriever: Retriever) -> None:
    assert all(retriever.inputs().values())
