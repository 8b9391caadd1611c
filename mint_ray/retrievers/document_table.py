"""Documents of a Parquet, CSV or JSONL file.

Tested by tests/retrievers/test_documents.py.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from mint_ray import storage
from mint_ray.config.loader import UserError, one_line
from mint_ray.retrievers import Document

REQUIRED, OPTIONAL = ("document_id", "text"), ("title", "label_id")
"""Columns of the table."""


def read_table(uri: str) -> list[Document]:
    """Return the documents of a file. Raises UserError for the first invalid row, or if there is none."""
    documents = []
    first_row: dict[str, int] = {}
    for number, row in enumerate(_read(uri).to_pylist(), start=1):
        location = f"{uri} row {number}"
        for column in REQUIRED:
            if not (row[column] or "").strip():
                raise UserError(f"{location}: {column}: expected a text, got {row[column]!r}")
        document_id = row["document_id"].strip()
        if document_id in first_row:
            raise UserError(
                f"{location}: document_id: {document_id!r} was already used in row {first_row[document_id]}"
            )
        first_row[document_id] = number
        documents.append(
            Document(
                document_id=document_id,
                title=(row.get("title") or "").strip(),
                text=row["text"].strip(),
                label_id=(row.get("label_id") or "").strip() or None,
            )
        )
    if not documents:
        raise UserError(f"{uri}: contains no document")
    return documents


def _read(uri: str) -> pa.Table:
    """Return the known columns as strings."""
    columns: dict[str, Any] = dict.fromkeys((*REQUIRED, *OPTIONAL), pa.string())
    with storage.open_input(uri) as stream:
        try:
            if uri.endswith(".parquet"):
                table = pq.read_table(stream)
            elif uri.endswith(".csv"):
                # a quoted text may contain line breaks
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
            raise UserError(f"{uri}: cannot be read: {one_line(error)}") from error
