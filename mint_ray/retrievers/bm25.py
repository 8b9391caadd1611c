"""BM25 retrieval: documents that share words with a query, weighted by the rarity of the words."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

import bm25s
import numpy as np

from mint_ray.config.loader import UserError
from mint_ray.retrievers import Document, Hit
from mint_ray.retrievers.config import Bm25


class Bm25Retriever:
    """Okapi BM25 in Lucene's variant (Kamphuis et al., ECIR 2020); English stop words are removed."""

    def __init__(self, config: Bm25) -> None:
        self.config = config
        self.ids: list[str] = []

    def inputs(self) -> dict[str, str]:
        """Return the version of bm25s, whose tokenization and arithmetic the ranking depends on."""
        return {"bm25s": importlib.metadata.version("bm25s")}

    def index(self, documents: Sequence[Document]) -> None:
        """Build the index of the documents. Raises UserError if no document contains a word."""
        self.ids = [document.document_id for document in documents]
        words = _tokenize([f"{document.title}\n{document.text}" for document in documents])
        if not any(words):
            raise UserError(f"documents: none of {len(documents)} contains a word of two letters or more")
        # numpy even if numba is installed: the same arithmetic on every machine
        self.scorer = bm25s.BM25(k1=self.config.k1, b=self.config.b, method="lucene", backend="numpy")
        self.scorer.index(words, show_progress=False)

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        """Return at most `top_k` documents per query, best first; none without a shared word."""
        return [self._search(words, top_k) for words in _tokenize(queries)]

    def _search(self, words: list[str], top_k: int) -> list[Hit]:
        known = [word for word in words if word in self.scorer.vocab_dict]
        if not known:
            return []
        scores_D = self.scorer.get_scores(known)
        # bm25s' own selection of the first k does not define the order of equal scores
        best = np.argsort(-scores_D, kind="stable")[:top_k]
        return [Hit(document_id=self.ids[i], score=float(scores_D[i])) for i in best if scores_D[i] > 0]


def _tokenize(texts: Sequence[str]) -> list[list[str]]:
    words: list[list[str]] = bm25s.tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False)
    return words
