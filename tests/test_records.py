"""Rows survive Arrow, with the schema of their class."""

from __future__ import annotations

import dataclasses

import pyarrow as pa
import pytest

from mint_ray.records import (
    Label,
    Message,
    Phenotype,
    PreferencePair,
    Record,
    TokenizedRecord,
    duration_in_years,
    from_table,
    parse_duration,
    schema_of,
    to_table,
)

RECORD = Record(
    record_id="r", group_id="g", label_id="l", phenotypes=[Phenotype(id="HP:1", label="x", excluded=True)],
    fields={"sex": "MALE"}, citations=["PMID:1"],
)  # fmt: skip
PAIR = PreferencePair(
    prompt=[Message(role="user", content="?")], chosen=[Message(role="assistant", content="a")],
    rejected=[Message(role="assistant", content="b")], record_id="r", split="train", teacher="t", sampler="hard",
    chosen_labels=["a"], rejected_labels=["b"], note_span=[0, 1],
)  # fmt: skip
TOKENS = TokenizedRecord(record_id="r", prompt_ids=[1, 2], completions=[[3], [4, 5]], pairs=[[0, 1]])
REFERRED = dataclasses.replace(TOKENS, reference_logps=[-0.1, -2.0])


RULED = dataclasses.replace(PAIR, chosen_scores=[0.5], rejected_scores=[0.25], difficulty=0.75)
BARE = Record(
    record_id="s", group_id="g", phenotypes=[Phenotype(id="HP:2", label="y"), Phenotype(id="HP:3", label="z")]
)


@pytest.mark.parametrize("row", [RECORD, PAIR, TOKENS, REFERRED, Label(label_id="a", name="A")])
def test_a_row_survives_arrow(row: object) -> None:
    assert from_table(type(row), to_table([row], type(row))) == [row]


@pytest.mark.parametrize("rows", [[RECORD, BARE], [PAIR, RULED], [TOKENS, REFERRED, TOKENS], []])
def test_rows_become_the_columns_that_pyarrow_makes_from_dicts(rows: list[object]) -> None:
    kind = type(rows[0]) if rows else Record
    table = to_table(rows, kind)
    assert table.equals(pa.Table.from_pylist([dataclasses.asdict(row) for row in rows], schema=schema_of(kind)))
    assert from_table(kind, table) == rows
    assert from_table(kind, pa.concat_tables([table.slice(1), table.slice(0, 1)])) == [*rows[1:], *rows[:1]]


def test_a_column_of_nulls_keeps_its_type() -> None:
    assert to_table([RECORD], Record).schema.field("text").type == pa.string()
    assert to_table([TOKENS], TokenizedRecord).schema == to_table([REFERRED], TokenizedRecord).schema


def test_required_columns_are_not_nullable() -> None:
    assert not schema_of(Record).field("record_id").nullable
    assert schema_of(Record).field("label_id").nullable


def test_a_table_of_another_schema_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the columns of Label"):
        from_table(Label, pa.table({"label_id": ["a"]}))


@pytest.mark.parametrize(
    ("text", "units", "years"),
    [
        ("P3Y6M", (3, 6, 0, 0), 3.5),
        ("P2W", (0, 0, 2, 0), 14 / 365.25),
        ("P0D", (0, 0, 0, 0), 0.0),
        ("P1DT5H", (0, 0, 0, 1), 1 / 365.25),
        ("P", None, None),
        ("17", None, None),
        ("", None, None),
    ],
)
def test_a_duration_is_read_in_units_and_years(
    text: str, units: tuple[int, int, int, int] | None, years: float | None
) -> None:
    assert parse_duration(text) == units
    assert duration_in_years(text) == (None if years is None else pytest.approx(years))
