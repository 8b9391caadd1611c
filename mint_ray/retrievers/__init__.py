"""Retrievers: search documents for the passages that a student reads ahead of a note."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, assert_never

from mint_ray.retrievers.config import AnyRetriever, Bm25, Dense


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text that can be retrieved."""

    document_id: str
    title: str
    text: str
    label_id: str | None = None
    """Label that the document is about, if known; used for recall only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """One retrieved document."""

    document_id: str
    score: float
    """Larger is better."""


class Retriever(Protocol):
    """Searches documents for the best matches of a query: `index` first, then `search`."""

    def inputs(self) -> dict[str, str]:
        """Return the identity of everything it reads besides the documents; loads no torch.

        Raises UserError if something is missing.
        """

    def index(self, documents: Sequence[Document]) -> None:
        """Build the index of the documents."""

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        """Return at most `top_k` documents per query, best first, equal scores in the order of the documents.

        The result of a query does not depend on the others of the batch.
        """


def build_retriever(config: AnyRetriever) -> Retriever:
    """Build the retriever of the settings, without documents; loads no torch."""
    match config:
        case Bm25():
            from mint_ray.retrievers.bm25 import Bm25Retriever

            return Bm25Retriever(config)
        case Dense():
            from mint_ray.retrievers.dense import DenseRetriever

            return DenseRetriever(config)
        case _:
            assert_never(config)
