"""Records of the rows of a Parquet, JSONL or CSV file, with images by path or in the rows."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, NoReturn, TypeGuard

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mint_ray import storage
from mint_ray.config.loader import UserError, one_line
from mint_ray.ontology import load_ontology
from mint_ray.records import SPLITS, Phenotype, Record, Split
from mint_ray.sources import BadRow, find_group
from mint_ray.sources.config import CODED_FIELD_PREFIX, IMAGE, LABEL_NAME, RECORD_FIELDS, Table

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".csv")
TERM_ID = re.compile(r"\w+:\w+")
CONTENT = ("text", "phenotypes", "image_uri", "fields")
"""Fields of which a record needs at least one."""
NO_COLUMN = "\0"
"""Column of a field that is not read: no column has this name."""
IMAGES_CHECKED = 8
"""Number of images, the first ones, that must not all be missing; checking all would take longer than reading."""
MAX_ROW_GROUP_BYTES = 256 << 20
"""Maximum size of the images of one row group, which is read at once."""


class RowError(ValueError):
    """A row that cannot be converted to a record; rows are counted by `reason`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class TableSource:
    """One record per row; a column with the name of a field needs no mapping."""

    def __init__(self, config: Table) -> None:
        self.config = config
        if not config.uri.endswith(SUFFIXES):
            raise UserError(f"{config.uri}: expected a name ending in {', '.join(SUFFIXES)}")
        if not storage.exists(config.uri):
            raise UserError(f"{config.uri}: no such file")
        mapped = {name: column or NO_COLUMN for name, column in config.columns.items()}
        self.columns = {name: name for name in (*RECORD_FIELDS, LABEL_NAME)} | mapped
        self._names: dict[str, Counter[str]] = {}

    def inputs(self) -> dict[str, str]:
        """Return the sha256 of the table; images are not read."""
        return {self.config.uri: storage.sha256(self.config.uri)}

    def read(self) -> Iterator[Record | BadRow]:
        """Yield one row per row of the table. Raises UserError if none of the first images exists."""
        names: dict[str, Counter[str]] = defaultdict(Counter)
        seen: dict[str, str] = {}
        missing: list[str] = []
        checked = 0
        for location, row in _rows(self.config.uri, self.columns, set(self.config.columns)):
            try:
                if isinstance(row, RowError):
                    raise row
                record = self._record(row)
                if record.record_id in seen:
                    first = f"{record.record_id!r} was already used at {seen[record.record_id]}"
                    raise RowError("duplicate_record_id", f"{self.columns['record_id']}: {first}")
            except RowError as error:
                yield BadRow(location, error.reason, f"{location}: {error}")
                continue
            seen[record.record_id] = location
            if record.image_uri is not None and IMAGE not in self.columns and checked < IMAGES_CHECKED:
                checked += 1
                if not storage.exists(record.image_uri):
                    missing.append(record.image_uri)
                if len(missing) == IMAGES_CHECKED:
                    self._raise_missing(missing)
            if record.label_id is not None:
                names[record.label_id][self._text(row, LABEL_NAME) or record.label_id] += 1
            yield record
        if missing and len(missing) == checked:
            self._raise_missing(missing)
        self._names = dict(names)

    def labels(self) -> dict[str, list[str]]:
        """Return the names of each label, most frequent first; reads the table if `read` was not called."""
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
            raise RowError("no_content", f"record {record_id!r} has no value in any of {columns}")
        return record

    def _text(self, row: dict[str, Any], name: str) -> str | None:
        value = row.get(self.columns[name])
        if isinstance(value, list | dict | bytes):
            raise RowError("not_text", f"{self.columns[name]}: expected text, got {value!r}")
        return None if value is None else str(value).strip() or None

    def _group(self, row: dict[str, Any]) -> str | None:
        value = self._text(row, "group_id")
        if value is None or self.config.group_pattern is None:
            return value
        group = find_group(self.config.group_pattern, value)
        if group is None:
            expected = f"{self.config.group_pattern!r} finds no group in {value!r}"
            raise RowError("no_group", f"{self.columns['group_id']}: {expected}")
        return group

    def _image_uri(self, row: dict[str, Any]) -> str | None:
        """Return an absolute URI, for a worker on any node."""
        if IMAGE in self.columns:
            return self._text(row, IMAGE)
        value, images = self._text(row, "image_uri"), self.config.images
        if value is None or (images is None and ("://" in value or value.startswith("/"))):
            return value
        base = storage.absolute(self.config.uri).rpartition("/")[0] if images is None else storage.absolute(images)
        if "://" in value or value.startswith("/") or ".." in value.split("/"):
            expected = f"expected a path below {base}, got {value!r}"
            raise RowError("image_outside", f"{self.columns['image_uri']}: {expected}")
        return base.replace("{}", value) if "{}" in base else storage.join(base, value)

    def _raise_missing(self, missing: list[str]) -> NoReturn:
        raise UserError(
            f"{self.config.uri}: {self.columns['image_uri']}: none of the first {len(missing)} images exists, for "
            f"example {missing[0]}"
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
            if key.startswith(CODED_FIELD_PREFIX):
                values[key.removeprefix(CODED_FIELD_PREFIX)] = row.get(mapped or NO_COLUMN)
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
    """Yield each row with its location; JSONL and CSV line by line, because Arrow rejects a file for one bad line."""
    required = {columns[name] for name in mapped} - {NO_COLUMN}
    try:
        with storage.open_input(uri) as stream:
            if uri.endswith(".parquet"):
                yield from _parquet_rows(uri, columns, required, pq.ParquetFile(stream))
            elif uri.endswith(".csv"):
                yield from _csv_rows(uri, required, io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""))
            else:
                # Arrow's stream does not iterate over lines
                plain = io.BufferedReader(stream)  # type: ignore[type-var]
                lines = gzip.GzipFile(fileobj=stream) if uri.endswith(".gz") else plain
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield f"{uri}:{number}", _json_row(line)
    except (EOFError, OSError, zlib.error, UnicodeDecodeError, csv.Error, pa.ArrowInvalid) as error:
        raise UserError(f"{uri}: cannot be read: {one_line(error)}") from error


def _parquet_rows(
    uri: str, columns: dict[str, str], required: set[str], file: pq.ParquetFile
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the mapped columns of each row; of an image column only the URI of the cell."""
    _check_columns(uri, required, file.schema_arrow.names)
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
    """Raise UserError for a column that is not of a plain type: values of extension types may be unpickled."""
    schema = file.schema_arrow
    for field in schema:
        extension = _extension(field)
        if extension:
            raise UserError(
                f"{uri}: column {field.name!r}: its type is the extension {extension!r}; only plain Arrow types are "
                "read"
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
            if size > MAX_ROW_GROUP_BYTES:
                raise UserError(
                    f"{uri}: column {image!r}: row group {group} contains {size:,} bytes of images, the maximum is "
                    f"{MAX_ROW_GROUP_BYTES:,}; write the table with smaller row groups"
                )


def _extension(field: pa.Field) -> str | None:
    """Return the name of the extension type of a column or of a nested field; None if there is none."""
    if isinstance(field.type, pa.BaseExtensionType):
        return str(field.type.extension_name)
    # a type that is not registered in this process has only its name in the metadata
    name = (field.metadata or {}).get(b"ARROW:extension:name")
    if name is not None:
        return str(name.decode())
    return next(filter(None, map(_extension, _children(field.type))), None)


def _children(kind: pa.DataType) -> list[pa.Field]:
    """Return the nested fields of a type."""
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
    children = _children(kind)
    if children:
        return all(_is_plain(child.type) for child in children)
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
    """Return the metadata of the column, or of the bytes of its struct, in one row group."""
    metadata = file.metadata.row_group(group)
    chunks = [metadata.column(index) for index in range(metadata.num_columns)]
    return [chunk for chunk in chunks if chunk.path_in_schema in (column, f"{column}.bytes")]


def _cells(uri: str, column: str, file: pq.ParquetFile) -> Iterator[str | None]:
    """Yield the URI of the image of each row, None if the cell is null."""
    row = 0
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        is_valid = [True] * rows
        statistics = [chunk.statistics for chunk in _chunks(file, column, group)]
        if not all(found is not None and found.has_null_count and found.null_count == 0 for found in statistics):
            values = file.read_row_group(group, columns=[column])[column].combine_chunks()
            if pa.types.is_struct(values.type):
                values = pc.struct_field(values, "bytes")
            is_valid = values.is_valid().to_pylist()
        for has_image in is_valid:
            yield f"{storage.absolute(uri)}#column={column}&row={row}" if has_image else None
            row += 1


def _csv_rows(uri: str, required: set[str], lines: io.TextIOWrapper) -> Iterator[tuple[str, dict[str, Any] | RowError]]:
    reader = csv.reader(lines)
    header = next(reader, [])
    _check_columns(uri, required, header)
    for cells in reader:
        location = f"{uri}:{reader.line_num}"
        if len(cells) == len(header):
            yield location, dict(zip(header, cells, strict=True))
        elif cells:
            yield location, RowError("wrong_columns", f"expected {len(header)} cells, got {len(cells)}")


def _json_row(line: bytes) -> dict[str, Any] | RowError:
    try:
        row = json.loads(line)
    except ValueError as error:  # bad syntax or bad UTF-8
        return RowError("not_json", f"not JSON: {one_line(error)}")
    return row if isinstance(row, dict) else RowError("not_json", f"expected an object, got {type(row).__name__}")


def _check_columns(uri: str, required: set[str], header: list[str]) -> None:
    missing = sorted(required.difference(header))
    if missing:
        raise UserError(f"{uri}: no column {missing[0]!r}; found {', '.join(header)}")
