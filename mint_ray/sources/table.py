"""Read records from the rows of a Parquet, JSONL or CSV file, with images by path or in the rows."""

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
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mint_ray import storage
from mint_ray.config.loader import UserError
from mint_ray.ontology import load_ontology
from mint_ray.records import SPLITS, Phenotype, Record, Split
from mint_ray.sources import BadRow, find_group
from mint_ray.sources.config import CODED, FIELDS, IMAGE, LABEL_NAME, Table

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".csv")
TERM_ID = re.compile(r"\w+:\w+")
CONTENT = ("text", "phenotypes", "image_uri", "fields")
NOWHERE = "\0"
"""The column of a field that is not to be read: none is called so."""
LOOKED_FOR = 8
"""Images whose files are looked for, the first ones: to look for all would take longer than to read the table."""
MOST_BYTES = 256 << 20
"""Of images in one row group, which is what is read at a time."""


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
        given = {name: column or NOWHERE for name, column in config.columns.items()}
        self.columns = {name: name for name in names} | given
        self._names: dict[str, Counter[str]] = {}

    def inputs(self) -> dict[str, str]:
        return {self.config.uri: storage.sha256(self.config.uri)}

    def read(self) -> Iterator[Record | BadRow]:
        names: dict[str, Counter[str]] = defaultdict(Counter)
        seen: dict[str, str] = {}
        missing: list[str] = []
        looked_for = 0
        for where, row in _rows(self.config.uri, self.columns, set(self.config.columns)):
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
            if record.image_uri is not None and IMAGE not in self.columns and looked_for < LOOKED_FOR:
                looked_for += 1
                if not storage.exists(record.image_uri):
                    missing.append(record.image_uri)
                if len(missing) == LOOKED_FOR:
                    self._tell_missing(missing)
            if record.label_id is not None:
                names[record.label_id][self._text(row, LABEL_NAME) or record.label_id] += 1
            yield record
        if missing and len(missing) == looked_for:
            self._tell_missing(missing)
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
            group_id=self._group(row) or record_id,
            label_id=self._text(row, "label_id"),
            split=self._split(row),
            text=self._text(row, "text"),
            phenotypes=self._phenotypes(row),
            image_uri=self._image_uri(row),
            fields=self._fields(row),
            citations=self._citations(row),
        )
        if not any(getattr(record, name) for name in CONTENT):
            columns = ", ".join(self.columns.get(name, name) for name in CONTENT)
            raise RowError("no_content", f"record {record_id!r} has nothing in any of {columns}")
        return record

    def _text(self, row: dict[str, Any], name: str) -> str | None:
        value = row.get(self.columns[name])
        if isinstance(value, list | dict | bytes):
            raise RowError("not_text", f"{self.columns[name]}: expected text, got {value!r}")
        return None if value is None else str(value).strip() or None

    def _group(self, row: dict[str, Any]) -> str | None:
        value = self._text(row, "group_id")
        if value is None or self.config.group is None:
            return value
        group = find_group(self.config.group, value)
        if group is None:
            raise RowError("no_group", f"{self.columns['group_id']}: {self.config.group!r} finds no group in {value!r}")
        return group

    def _image_uri(self, row: dict[str, Any]) -> str | None:
        """Whole, for a worker on any machine."""
        if IMAGE in self.columns:
            return self._text(row, IMAGE)
        value, images = self._text(row, "image_uri"), self.config.images
        if value is None or (images is None and ("://" in value or value.startswith("/"))):
            return value
        place = storage.absolute(self.config.uri).rpartition("/")[0] if images is None else storage.absolute(images)
        if "://" in value or value.startswith("/") or ".." in value.split("/"):
            expected = f"expected a path below {place}, got {value!r}"
            raise RowError("image_outside", f"{self.columns['image_uri']}: {expected}")
        return place.replace("{}", value) if "{}" in place else storage.join(place, value)

    def _tell_missing(self, missing: list[str]) -> None:
        raise UserError(
            f"{self.config.uri}: {self.columns['image_uri']}: none of the first {len(missing)} images is there, such "
            f"as {missing[0]}"
        )

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
                values[key.removeprefix(CODED)] = row.get(mapped or NOWHERE)
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


def _rows(uri: str, columns: dict[str, str], mapped: set[str]) -> Iterator[tuple[str, dict[str, Any] | RowError]]:
    """Rows with where they stand; JSONL and CSV line by line, since Arrow refuses a whole file for one bad line."""
    wanted = {columns[name] for name in mapped} - {NOWHERE}
    try:
        with storage.open_input(uri) as stream:
            if uri.endswith(".parquet"):
                yield from _parquet_rows(uri, columns, wanted, pq.ParquetFile(stream))
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


def _parquet_rows(
    uri: str, columns: dict[str, str], wanted: set[str], file: pq.ParquetFile
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Columns that are asked for, and no others; of images only where they lie."""
    _check_columns(uri, wanted, file.schema_arrow.names)
    image = columns.get(IMAGE)
    read = [name for name in file.schema_arrow.names if name in columns.values() and name != image]
    _check_types(uri, read, image, file)
    cells = None if image is None else _cells(uri, image, file)
    number = 0
    for batch in file.iter_batches(columns=read):
        for row in batch.to_pylist():
            number += 1
            yield f"{uri}:{number}", row if cells is None else row | {image: next(cells)}


def _check_types(uri: str, read: list[str], image: str | None, file: pq.ParquetFile) -> None:
    """Raise UserError for a column that is not plain: values of an extension type are made by code or unpickled."""
    schema = file.schema_arrow
    for field in schema:
        extension = _extension(field)
        if extension:
            raise UserError(
                f"{uri}: column {field.name!r}: its type is the extension {extension!r}; tables are read whose columns "
                "are all plain"
            )
    for name in read:
        if not _is_plain(schema.field(name).type):
            expected = "expected text, numbers, times, or lists and structs of them"
            raise UserError(f"{uri}: column {name!r}: {expected}, got {schema.field(name).type}")
    if image is not None:
        kind = schema.field(image).type
        inner = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
            raise UserError(f"{uri}: column {image!r}: expected images as binary or struct<bytes: binary>, got {kind}")
        for group in range(file.metadata.num_row_groups):
            size = sum(chunk.total_uncompressed_size for chunk in _chunks(file, image, group))
            if size > MOST_BYTES:
                raise UserError(
                    f"{uri}: column {image!r}: row group {group} holds {size:,} bytes of images, at most "
                    f"{MOST_BYTES:,}; write it with fewer rows in each"
                )


def _extension(field: pa.Field) -> str | None:
    """Name of the extension type that a column has, or any part of it."""
    if isinstance(field.type, pa.BaseExtensionType):
        return str(field.type.extension_name)
    # of a type that is not registered in this process only the name is left
    name = (field.metadata or {}).get(b"ARROW:extension:name")
    if name is not None:
        return str(name.decode())
    return next(filter(None, map(_extension, _parts(field.type))), None)


def _parts(kind: pa.DataType) -> list[pa.Field]:
    if pa.types.is_struct(kind):
        return list(kind)
    if pa.types.is_map(kind):
        return [kind.key_field, kind.item_field]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [kind.value_field]
    if pa.types.is_dictionary(kind):
        return [pa.field("value", kind.value_type)]
    return []


def _is_plain(kind: pa.DataType) -> bool:
    parts = _parts(kind)
    if parts:
        return all(_is_plain(part.type) for part in parts)
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_temporal(kind)
        or pa.types.is_null(kind)
        or pa.types.is_struct(kind)  # without fields
    )


def _chunks(file: pq.ParquetFile, column: str, group: int) -> list[Any]:
    """What the file says of the column, or of the bytes of its struct, in one row group."""
    described = file.metadata.row_group(group)
    chunks = [described.column(place) for place in range(described.num_columns)]
    return [chunk for chunk in chunks if chunk.path_in_schema in (column, f"{column}.bytes")]


def _cells(uri: str, column: str, file: pq.ParquetFile) -> Iterator[str | None]:
    """The URI of the image in each row, None where there is none."""
    row = 0
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        there = [True] * rows
        stated = [chunk.statistics for chunk in _chunks(file, column, group)]
        if not all(about is not None and about.has_null_count and about.null_count == 0 for about in stated):
            values = file.read_row_group(group, columns=[column])[column].combine_chunks()
            if pa.types.is_struct(values.type):
                values = pc.struct_field(values, "bytes")
            there = values.is_valid().to_pylist()
        for is_there in there:
            yield f"{storage.absolute(uri)}#column={column}&row={row}" if is_there else None
            row += 1


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
