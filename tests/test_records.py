from __future__ import annotations

import pyarrow as pa
import pytest

from mint_ray.records import Label, Message, Phenotype, PreferencePair, Record, from_table, schema_of, to_table

RECORD = Record(
    record_id="r", group_id="g", label_id="l", phenotypes=[Phenotype(id="HP:1", label="x", excluded=True)],
    fields={"sex": "MALE"}, citations=["PMID:1"],
)  # fmt: skip
PAIR = PreferencePair(
    prompt=[Message(role="user", content="?")], chosen=[Message(role="assistant", content="a")],
    rejected=[Message(role="assistant", content="b")], record_id="r", split="train", teacher="t", sampler="hard",
    chosen_labels=["a"], rejected_labels=["b"],
)  # fmt: skip


@pytest.mark.parametrize("row", [RECORD, PAIR, Label(label_id="a", name="A")])
def test_a_row_survives_arrow(row: object) -> None:
    assert from_table(type(row), to_table([row], type(row))) == [row]


def test_a_column_of_nulls_keeps_its_type() -> None:
    assert to_table([RECORD], Record).schema.field("text").type == pa.string()


def test_required_columns_are_not_nullable() -> None:
    assert not schema_of(Record).field("record_id").nullable
    assert schema_of(Record).field("label_id").nullable


def test_a_table_of_another_schema_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the columns of Label"):
        from_table(Label, pa.table({"label_id": ["a"]}))
