"""Records of small Parquet, JSONL and CSV files."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mint_ray.config.loader import UserError, from_data
from mint_ray.images import Frame, decode_image, read_image
from mint_ray.records import Phenotype, Record, to_table
from mint_ray.sources import BadRow, build_source
from mint_ray.sources import table as module
from mint_ray.sources.config import Table
from tests.test_images import picture

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


def test_a_column_that_is_null_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "cases.csv").write_text(",record_id,split,text\nnone,a,published test,seizures\n")
    [row] = build_source(Table(uri=str(tmp_path / "cases.csv"), columns={"split": None, "fields.part": None})).read()
    assert row == Record(record_id="a", group_id="a", text="seizures")
    [bad] = build_source(Table(uri=str(tmp_path / "cases.csv"))).read()
    assert isinstance(bad, BadRow)
    assert bad.reason == "unknown_split"


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


def test_a_group_is_found_in_its_column(tmp_path: Path) -> None:
    rows = [{"slide": name, "text": "x"} for name in ("TCGA-44-01A", "TCGA-44-02B", "C3L-1", "GTEX-55-01A")]
    path = write_jsonl(tmp_path / "x.jsonl", *rows)
    settings = Table(
        uri=str(path), columns={"record_id": "slide", "group_id": "slide"}, group_pattern=r"^(?:TCGA|GTEX)-(\d\d)"
    )
    first, second, bad, last = build_source(settings).read()
    assert [row.group_id for row in (first, second, last) if isinstance(row, Record)] == ["44", "44", "55"]
    assert isinstance(bad, BadRow)
    assert (bad.reason, bad.location) == ("no_group", f"{path}:3")
    assert bad.message.endswith("finds no group in 'C3L-1'")


@pytest.mark.parametrize(
    ("row", "reason", "message"),
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
def test_an_invalid_row_has_its_location_and_reason(tmp_path: Path, row: Any, reason: str, message: str) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", {"record_id": "first", "text": "x"}, row, {"record_id": "z", "text": "x"})
    _, bad, last = read(path)
    assert isinstance(last, Record)
    assert isinstance(bad, BadRow)
    assert (bad.reason, bad.location) == (reason, f"{path}:2")
    assert bad.message.startswith(f"{path}:2: ")
    assert re.search(message, bad.message), bad.message


def test_a_csv_row_with_cells_missing_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("record_id,text\na,one\nb\nc,three\n")
    rows = read(path)
    assert [row.reason if isinstance(row, BadRow) else row.record_id for row in rows] == ["a", "wrong_columns", "c"]
    assert isinstance(rows[1], BadRow)
    assert rows[1].location == f"{path}:3"


def test_a_missing_mapped_column_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("record_id,text\na,b\n")
    with pytest.raises(UserError, match="no column 'omim'; found record_id, text"):
        read(tmp_path / "x.csv", {"label_id": "omim"})


def test_missing_unreadable_and_unknown_files_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "none.csv")
    with pytest.raises(UserError, match="expected a name ending in"):
        read(tmp_path / "x.xlsx")
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match=r"x\.parquet: cannot be read"):
        read(tmp_path / "x.parquet")


def write_images(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(picture())


def image_uris(path: Path, **settings: Any) -> list[str | None]:
    rows = list(build_source(Table(uri=str(path), **settings)).read())
    assert all(isinstance(row, Record) for row in rows), rows
    return [row.image_uri for row in rows if isinstance(row, Record)]


def test_images_are_in_the_configured_location_or_next_to_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "images", "a.jpg")
    write_images(tmp_path, "a.jpg")
    monkeypatch.chdir(tmp_path)
    path = write_jsonl(tmp_path / "x.jsonl", {"record_id": "1", "image_uri": "a"})
    assert image_uris(path, images="images/{}.jpg") == [f"{tmp_path}/images/a.jpg"]
    path = write_jsonl(tmp_path / "x.jsonl", {"record_id": "1", "image_uri": "a.jpg"})
    assert image_uris(path, images=str(tmp_path / "images")) == [f"{tmp_path}/images/a.jpg"]
    assert image_uris(Path("x.jsonl")) == [f"{tmp_path}/a.jpg"]
    path = write_jsonl(tmp_path / "x.jsonl", {"record_id": "1", "image_uri": f"{tmp_path}/images/a.jpg"})
    assert image_uris(path) == [f"{tmp_path}/images/a.jpg"]


@pytest.mark.parametrize("value", ["../secret.jpg", "/etc/passwd", "s3://other/a.jpg", "a/../../b.jpg"])
def test_an_image_outside_the_folder_is_a_bad_row(tmp_path: Path, value: str) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", {"record_id": "1", "picture": value})
    settings = Table(uri=str(path), columns={"image_uri": "picture"}, images=str(tmp_path / "images"))
    [bad] = build_source(settings).read()
    assert isinstance(bad, BadRow)
    assert (bad.reason, bad.message) == (
        "image_outside",
        f"{path}:1: picture: expected a path below {tmp_path}/images, got {value!r}",
    )


def test_the_first_images_must_not_all_be_missing(tmp_path: Path) -> None:
    rows = [{"record_id": str(number), "image_uri": f"{number}.png"} for number in range(20)]
    path = write_jsonl(tmp_path / "x.jsonl", *rows)
    expected = rf"x\.jsonl: image_uri: none of the first 8 images exists, for example {tmp_path}/0\.png$"
    with pytest.raises(UserError, match=expected):
        read(path)
    write_images(tmp_path, "7.png")
    assert len(image_uris(path)) == 20
    write_jsonl(path, *rows[:2])
    with pytest.raises(UserError, match="none of the first 2 images"):
        read(path)


def test_images_in_the_cells_of_a_table_are_referred_to_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = [picture(20 + number, 20) for number in range(5)]
    structs = [{"bytes": content, "path": "x.png"} for content in contents]
    holes = [contents[0], None, *contents[2:]]
    struct_holes = [*structs[:3], {"bytes": None, "path": "gone.png"}, None]
    table = pa.table({"record_id": list("abcde"), "text": ["x"] * 5, "cell": contents, "struct": structs,
                      "holes": holes, "struct holes": struct_holes})  # fmt: skip
    path = tmp_path / "x.parquet"
    pq.write_table(table, path, row_group_size=2)
    for column in ("cell", "struct"):
        uris = image_uris(path, columns={"image": column})
        assert uris == [f"{path}#column={column}&row={row}" for row in range(5)]
        for uri, content in zip(uris, contents, strict=True):
            expected = decode_image(content, Frame(size=16), "x")
            assert np.array_equal(read_image(str(uri), Frame(size=16)), expected)
    has_image = [uri is not None for uri in image_uris(path, columns={"image": "holes"})]
    assert has_image == [True, False, True, True, True]
    has_image = [uri is not None for uri in image_uris(path, columns={"image": "struct holes"})]
    assert has_image == [True, True, True, False, False]
    monkeypatch.setattr(module, "MAX_ROW_GROUP_BYTES", 100)
    with pytest.raises(
        UserError, match=r"column 'cell': row group 0 contains [\d,]+ bytes of images, the maximum is 100;"
    ):
        read(path, {"image": "cell"})


def tensors() -> pa.Array:
    from ray.data._internal.tensor_extensions.arrow import ArrowTensorArray

    return ArrowTensorArray.from_numpy(np.zeros((2, 2, 2)))


class Trap:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def objects(trap: str = "/nowhere") -> pa.Array:
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

    return ArrowPythonObjectArray.from_objects([Trap(trap), Trap(trap)])


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("text", tensors, r"column 'text': its type is the extension 'ray\.data\.arrow_tensor"),
        ("unused", objects, r"column 'unused': its type is the extension 'ray\.data\.arrow_pickled_object'"),
        ("image", objects, r"column 'image': its type is the extension"),
        ("unused", lambda: pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16] * 2, pa.binary(16))),
         "column 'unused': its type is the extension 'arrow.uuid'"),
        ("text", lambda: pa.array([b"a", b"b"]), "column 'text': expected text, numbers, .* got binary"),
        ("fields", lambda: pa.array([[{"a": b"x"}]] * 2), "column 'fields': expected text, numbers, .* got list<"),
        ("image", lambda: pa.array(["a.png", "b.png"]), "column 'image': expected images as binary or .* got string"),
        ("image", lambda: pa.array([{"bytes": "x"}] * 2), "column 'image': expected images as binary or .* got struct"),
    ],
)  # fmt: skip
def test_a_column_of_another_type_is_refused_before_a_row_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str, values: Any, message: str
) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"record_id": ["a", "b"], column: values()}), path)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *_, **__: pytest.fail("a row was read"))
    with pytest.raises(UserError, match=message):
        read(path, {"image": "image"} if column == "image" else {})


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"record_id": ["a", "b"], "image": objects(str(tmp_path / "sprung"))}), path)
    with pytest.raises(UserError, match="extension"):
        read(path, {"image": "image"})
    # a record that points to such a cell finds no image either
    with pytest.raises(UserError, match="column 'image': expected images as bytes, got"):
        read_image(f"{path}#column=image&row=0", Frame(size=8))
    assert not (tmp_path / "sprung").exists()


def test_an_unregistered_extension_type_is_refused_by_its_name(tmp_path: Path) -> None:
    field = pa.field("odd", pa.int64(), metadata={"ARROW:extension:name": "somebody.else"})
    inner = pa.field("fields", pa.struct([field]))
    for column in (field, inner):
        values = [1] if column is field else [{"odd": 1}]
        table = pa.table([pa.array(["a"]), pa.array(values, column.type)],
                         schema=pa.schema([pa.field("record_id", pa.string()), column]))  # fmt: skip
        pq.write_table(table, tmp_path / "x.parquet")
        with pytest.raises(UserError, match=f"column {column.name!r}: its type is the extension 'somebody.else'"):
            read(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"uri": "x.csv", "columns": {"image": "i"}}, "only a .parquet file can contain images"),
        ({"uri": "x.parquet", "columns": {"image": "i", "image_uri": "u"}}, "the table contains the images, so"),
        ({"uri": "x.parquet", "columns": {"image": "i"}, "images": "d"}, "the table contains the images, so"),
        ({"uri": "x.csv", "group_pattern": "("}, r"group_pattern: '\(' is not a regular expression"),
    ],
)
def test_contradictory_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_data(Table, {"kind": "table", **settings})


def test_a_mapping_of_an_unknown_field_is_refused_when_the_config_is_read() -> None:
    with pytest.raises(UserError, match="'colour' is not a field of a record"):
        from_data(Table, {"kind": "table", "uri": "x.csv", "columns": {"colour": "c"}})
