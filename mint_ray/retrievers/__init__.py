"""What a student may look up: documents, and how those nearest to a query are found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, assert_never

from mint_ray.retrievers.config import AnyRetriever, Bm25, Dense


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text that can be found."""

    document_id: str
    title: str
    text: str
    label_id: str | None = None
    """The label that it is about, where that is known; for counting recall alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """One document that was found."""

    document_id: str
    score: float
    """Larger is better."""


class Retriever(Protocol):
    """Finds the documents nearest to a query: `index` first, then `search`."""

    def inputs(self) -> dict[str, str]:
        """Identity of everything it reads beside the documents. Raises UserError when something is missing."""

    def index(self, documents: Sequence[Document]) -> None:
        """Make the documents ready to be searched."""

    def search(self, queries: Sequence[str], most: int) -> list[list[Hit]]:
        """At most `most` documents for each query, best first, equals in the order of the documents; the same query
        finds the same in any batch."""


def build_retriever(config: AnyRetriever) -> Retriever:
    """The retriever that `config` describes, without documents yet."""
    match config:
        case Bm25():
            from mint_ray.retrievers.bm25 import Bm25Retriever

            return Bm25Retriever(config)
        case Dense():
            from mint_ray.retrievers.dense import DenseRetriever

            return DenseRetriever(config)
        case _:
            assert_never(config)
