"""Read records from the rows of a Parquet, JSONL or CSV file."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, TypeGuard

import pyarrow as pa
import pyarrow.parquet as pq

from mint_ray import storage
from mint_ray.loading import UserError
from mint_ray.ontology import load_ontology
from mint_ray.records import SPLITS, Phenotype, Record, Split
from mint_ray.sources import BadRow
from mint_ray.sources.config import CODED, FIELDS, LABEL_NAME, Table

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".csv")
TERM_ID = re.compile(r"\w+:\w+")
CONTENT = ("text", "phenotypes", "image_uri", "fields")


class RowError(ValueError):
    """Why one row became no record."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class TableSource:
    """One record per row; columns that carry a field's own name need no mapping."""

    def __init__(self, config: Table) -> None:
        self.config = config
        if not config.uri.endswith(SUFFIXES):
            raise UserError(f"{config.uri}: expected a name ending in {', '.join(SUFFIXES)}")
        if not storage.exists(config.uri):
            raise UserError(f"{config.uri}: no such file")
        names = (*FIELDS, LABEL_NAME)
        self.columns = {name: name for name in names} | config.columns
        self._names: dict[str, Counter[str]] = {}

    def inputs(self) -> dict[str, str]:
        return {self.config.uri: storage.sha256(self.config.uri)}

    def read(self) -> Iterator[Record | BadRow]:
        names: dict[str, Counter[str]] = defaultdict(Counter)
        seen: dict[str, str] = {}
        for where, row in _rows(self.config.uri, set(self.config.columns.values())):
            try:
                if isinstance(row, RowError):
                    raise row
                record = self._record(row)
                if record.record_id in seen:
                    first = f"{record.record_id!r} was already used at {seen[record.record_id]}"
                    raise RowError("duplicate_record_id", f"{self.columns['record_id']}: {first}")
            except RowError as error:
                yield BadRow(where, error.reason, f"{where}: {error}")
                continue
            seen[record.record_id] = where
            if record.label_id is not None:
                names[record.label_id][self._text(row, LABEL_NAME) or record.label_id] += 1
            yield record
        self._names = dict(names)

    def labels(self) -> dict[str, list[str]]:
        if not self._names:
            for _ in self.read():
                pass
        return {label_id: [name for name, _ in names.most_common()] for label_id, names in self._names.items()}

    def _record(self, row: dict[str, Any]) -> Record:
        record_id = self._text(row, "record_id")
        if record_id is None:
            raise RowError("no_record_id", f"{self.columns['record_id']}: required, and not given")
        record = Record(
            record_id=record_id,
            group_id=self._text(row, "group_id") or record_id,
            label_id=self._text(row, "label_id"),
            split=self._split(row),
            text=self._text(row, "text"),
            phenotypes=self._phenotypes(row),
            image_uri=self._text(row, "image_uri"),
            fields=self._fields(row),
            citations=self._citations(row),
        )
        if not any(getattr(record, name) for name in CONTENT):
            columns = ", ".join(self.columns[name] for name in CONTENT)
            raise RowError("no_content", f"record {record_id!r} has nothing in any of {columns}")
        return record

    def _text(self, row: dict[str, Any], name: str) -> str | None:
        value = row.get(self.columns[name])
        if isinstance(value, list | dict | bytes):
            raise RowError("not_text", f"{self.columns[name]}: expected text, got {value!r}")
        return None if value is None else str(value).strip() or None

    def _split(self, row: dict[str, Any]) -> Split:
        value = self._text(row, "split") or "train"
        if not _is_split(value):
            expected = f"expected one of {', '.join(SPLITS)}, got {value!r}"
            raise RowError("unknown_split", f"{self.columns['split']}: {expected}")
        return value

    def _phenotypes(self, row: dict[str, Any]) -> list[Phenotype]:
        column = self.columns["phenotypes"]
        value = row.get(column)
        if value is None:
            return []
        if isinstance(value, str):
            value = value.split(";")
        if not isinstance(value, list):
            raise RowError("bad_phenotype", f"{column}: expected a list or a text with ';' between ids, got {value!r}")
        given = (_phenotype(column, item) for item in value if not isinstance(item, str) or item.strip())
        return list({phenotype.id: phenotype for phenotype in given}.values())

    def _fields(self, row: dict[str, Any]) -> dict[str, str]:
        column = self.columns["fields"]
        value = row.get(column) or {}
        if isinstance(value, list):  # an Arrow map
            value = dict(value)
        if not isinstance(value, dict):
            raise RowError("not_fields", f"{column}: expected an object, got {value!r}")
        values = {str(name): item for name, item in value.items()}
        for key, mapped in self.config.columns.items():
            if key.startswith(CODED):
                values[key.removeprefix(CODED)] = row.get(mapped)
        return {name: str(item).strip() for name, item in values.items() if item is not None and str(item).strip()}

    def _citations(self, row: dict[str, Any]) -> list[str]:
        value = row.get(self.columns["citations"]) or []
        items = value.split(";") if isinstance(value, str) else value
        if not isinstance(items, list):
            raise RowError("not_text", f"{self.columns['citations']}: expected text or a list, got {value!r}")
        return [str(item).strip() for item in items if str(item).strip()]


def _phenotype(column: str, item: Any) -> Phenotype:
    ontology = load_ontology()
    given = {"id": item} if isinstance(item, str) else item
    if not isinstance(given, dict) or not isinstance(given.get("id"), str):
        raise RowError("bad_phenotype", f"{column}: expected an id such as HP:0001250, got {item!r}")
    text = given["id"].strip()
    term_id = text.lstrip("!-").strip()
    if not TERM_ID.fullmatch(term_id):
        raise RowError("bad_phenotype", f"{column}: expected an id such as HP:0001250, got {text!r}")
    current = ontology.resolve(term_id) or term_id
    label = ontology.names.get(current) or given.get("label") or current
    return Phenotype(id=current, label=str(label), excluded=text[0] in "!-" or given.get("excluded") is True)


def _is_split(value: str) -> TypeGuard[Split]:
    return value in SPLITS


def _rows(uri: str, wanted: set[str]) -> Iterator[tuple[str, dict[str, Any] | RowError]]:
    """Rows with where they stand; JSONL and CSV line by line, since Arrow refuses a whole file for one bad line."""
    try:
        with storage.open_input(uri) as stream:
            if uri.endswith(".parquet"):
                file = pq.ParquetFile(stream)
                _check_columns(uri, wanted, file.schema_arrow.names)
                number = 0
                for batch in file.iter_batches():
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{uri}:{number}", row
            elif uri.endswith(".csv"):
                yield from _csv_rows(uri, wanted, io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""))
            else:
                # Arrow's stream has no lines of its own
                plain = io.BufferedReader(stream)  # type: ignore[type-var]
                lines = gzip.GzipFile(fileobj=stream) if uri.endswith(".gz") else plain
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield f"{uri}:{number}", _json_row(line)
    except (EOFError, OSError, zlib.error, UnicodeDecodeError, csv.Error, pa.ArrowInvalid) as error:
        raise UserError(f"{uri}: cannot be read: {' '.join(str(error).split())}") from error


def _csv_rows(uri: str, wanted: set[str], lines: io.TextIOWrapper) -> Iterator[tuple[str, dict[str, Any] | RowError]]:
    reader = csv.reader(lines)
    header = next(reader, [])
    _check_columns(uri, wanted, header)
    for cells in reader:
        where = f"{uri}:{reader.line_num}"
        if len(cells) == len(header):
            yield where, dict(zip(header, cells, strict=True))
        elif cells:
            yield where, RowError("wrong_columns", f"expected {len(header)} cells, got {len(cells)}")


def _json_row(line: bytes) -> dict[str, Any] | RowError:
    try:
        row = json.loads(line)
    except ValueError as error:  # bad syntax or bad UTF-8
        return RowError("not_json", f"not JSON: {' '.join(str(error).split())}")
    return row if isinstance(row, dict) else RowError("not_json", f"expected an object, got {type(row).__name__}")


def _check_columns(uri: str, wanted: set[str], header: list[str]) -> None:
    missing = sorted(wanted.difference(header))
    if missing:
        raise UserError(f"{uri}: no column {missing[0]!r}; found {', '.join(header)}")
