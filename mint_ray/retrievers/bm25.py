"""Find documents by the words that they share with a query, rare words counting most."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

import bm25s
import numpy as np

from mint_ray.config.loader import UserError
from mint_ray.retrievers import Document, Hit
from mint_ray.retrievers.config import Bm25


class Bm25Retriever:
    """Okapi BM25 in Lucene's form (Kamphuis et al., ECIR 2020); English words that tell nothing are left out."""

    def __init__(self, config: Bm25) -> None:
        self.config = config
        self.ids: list[str] = []

    def inputs(self) -> dict[str, str]:
        return {"bm25s": importlib.metadata.version("bm25s")}

    def index(self, documents: Sequence[Document]) -> None:
        """Raises UserError if no document has a word in it."""
        self.ids = [document.document_id for document in documents]
        words = _words([f"{document.title}\n{document.text}" for document in documents])
        if not any(words):
            raise UserError(f"documents: none of {len(documents)} has a word of two letters or more in it")
        # numpy even where numba is installed: one arithmetic on every machine
        self.scorer = bm25s.BM25(k1=self.config.k1, b=self.config.b, method="lucene", backend="numpy")
        self.scorer.index(words, show_progress=False)

    def search(self, queries: Sequence[str], most: int) -> list[list[Hit]]:
        """Documents that share no word with a query are not found."""
        return [self._search(words, most) for words in _words(queries)]

    def _search(self, words: list[str], most: int) -> list[Hit]:
        known = [word for word in words if word in self.scorer.vocab_dict]
        if not known:
            return []
        scores_D = self.scorer.get_scores(known)
        # its own choice of the first k leaves the order of equals open
        best = np.argsort(-scores_D, kind="stable")[:most]
        return [Hit(document_id=self.ids[i], score=float(scores_D[i])) for i in best if scores_D[i] > 0]


def _words(texts: Sequence[str]) -> list[list[str]]:
    words: list[list[str]] = bm25s.tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False)
    return words
