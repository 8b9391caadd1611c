"""Records from small Parquet, JSONL and CSV files."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mint_ray.loading import UserError, from_data
from mint_ray.records import Phenotype, Record, to_table
from mint_ray.sources import BadRow, build_source
from mint_ray.sources.config import Table

COLUMNS = {"record_id": "case", "group_id": "person", "label_id": "omim", "label_name": "diagnosis",
           "phenotypes": "findings", "fields.age": "age", "split": "part"}  # fmt: skip
RECORD = Record(
    record_id="007",
    group_id="p1",
    label_id="OMIM:1",
    split="test",
    phenotypes=[
        Phenotype(id="HP:0001250", label="Seizure"),
        Phenotype(id="HP:0000365", label="Hearing impairment", excluded=True),
    ],
    fields={"age": "P4Y"},
)
ROW = {"case": "007", "person": "p1", "omim": "OMIM:1", "diagnosis": "Invented syndrome", "age": "P4Y", "part": "test",
       "findings": "HP:0001250; !HP:0000365"}  # fmt: skip


def read(path: Path, columns: dict[str, str] | None = None) -> list[Record | BadRow]:
    return list(build_source(Table(uri=str(path), columns=columns or {})).read())


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_every_format_gives_the_same_record(tmp_path: Path) -> None:
    listed = ROW | {"findings": ["HP:0001250", "-HP:0000365"]}
    write_jsonl(tmp_path / "x.jsonl", listed)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROW).encode()))
    (tmp_path / "x.csv").write_text(",".join(ROW) + "\n" + ",".join(ROW.values()) + "\n")
    pq.write_table(pa.Table.from_pylist([listed]), tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.jsonl.gz", "x.csv", "x.parquet"):
        assert read(tmp_path / name, COLUMNS) == [RECORD], name


def test_our_own_records_are_read_back_without_a_mapping(tmp_path: Path) -> None:
    pq.write_table(to_table([RECORD], Record), tmp_path / "records.parquet")
    assert read(tmp_path / "records.parquet") == [RECORD]


def test_a_label_is_called_by_its_name_column(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", ROW)
    assert build_source(Table(uri=str(path), columns=COLUMNS)).labels() == {"OMIM:1": ["Invented syndrome"]}


def test_without_a_group_each_record_is_its_own(tmp_path: Path) -> None:
    [record] = read(write_jsonl(tmp_path / "x.jsonl", {"record_id": 5, "text": "A note."}))
    assert record == Record(record_id="5", group_id="5", text="A note.")


@pytest.mark.parametrize(
    ("row", "reason", "said"),
    [
        ("{", "not_json", "not JSON"),
        ("[]", "not_json", "list"),
        ({"text": "x"}, "no_record_id", "record_id"),
        ({"record_id": "a"}, "no_content", "text, phenotypes"),
        ({"record_id": "a", "text": "x", "split": "dev"}, "unknown_split", "split: .*'dev'"),
        ({"record_id": "a", "text": ["x"]}, "not_text", r"text: .*\['x'\]"),
        ({"record_id": "a", "phenotypes": "seizure"}, "bad_phenotype", "phenotypes: .*'seizure'"),
        ({"record_id": "a", "phenotypes": [3]}, "bad_phenotype", "phenotypes: .*3"),
        ({"record_id": "a", "fields": 3}, "not_fields", "fields: .*3"),
        ({"record_id": "first", "text": "x"}, "duplicate_record_id", r"'first' was already used at .*:1"),
    ],
)
def test_an_unusable_row_is_told_with_its_number_and_reason(tmp_path: Path, row: Any, reason: str, said: str) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", {"record_id": "first", "text": "x"}, row, {"record_id": "z", "text": "x"})
    _, bad, last = read(path)
    assert isinstance(last, Record)
    assert isinstance(bad, BadRow)
    assert (bad.reason, bad.where) == (reason, f"{path}:2")
    assert bad.message.startswith(f"{path}:2: ")
    assert re.search(said, bad.message), bad.message


def test_a_csv_row_with_cells_missing_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("record_id,text\na,one\nb\nc,three\n")
    rows = read(path)
    assert [row.reason if isinstance(row, BadRow) else row.record_id for row in rows] == ["a", "wrong_columns", "c"]
    assert isinstance(rows[1], BadRow)
    assert rows[1].where == f"{path}:3"


def test_a_mapped_column_that_is_not_there_is_an_error_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("record_id,text\na,b\n")
    with pytest.raises(UserError, match="no column 'omim'; found record_id, text"):
        read(tmp_path / "x.csv", {"label_id": "omim"})


def test_missing_unreadable_and_unknown_files_are_errors_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "none.csv")
    with pytest.raises(UserError, match="expected a name ending in"):
        read(tmp_path / "x.xlsx")
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match=r"x\.parquet: cannot be read"):
        read(tmp_path / "x.parquet")


def test_a_column_for_no_field_is_refused_when_the_config_is_read() -> None:
    with pytest.raises(UserError, match="'colour' is no field of a record"):
        from_data(Table, {"kind": "table", "uri": "x.csv", "columns": {"colour": "c"}})
