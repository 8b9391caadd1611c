"""Subgroups of a few records written by hand."""

from __future__ import annotations

import pytest

from mint_ray.metrics import find_subgroups
from mint_ray.metrics.subgroups import age_in_years
from mint_ray.records import Record


def record(record_id: str, label_id: str, **fields: str) -> Record:
    return Record(record_id=record_id, group_id=record_id, label_id=label_id, split="test", fields=fields)


@pytest.mark.parametrize(
    ("age", "years"),
    [("P3Y", 3), ("P1Y6M", 1.5), ("P2W", 14 / 365.25), ("P0D", 0), ("17.5", 17.5), ("40", 40), ("", None), ("old", None), ("P", None), ("-3", None)],
)  # fmt: skip
def test_ages_are_read_as_durations_or_years(age: str, years: float | None) -> None:
    assert age_in_years(age) == (None if years is None else pytest.approx(years))


def test_records_are_split_by_label_frequency_sex_and_age() -> None:
    records = [
        record("1", "a", sex="FEMALE", age="P11M"),
        record("2", "b", sex="m", age="P17Y11M"),
        record("3", "c", age="18"),
        record("4", "d", sex="other", age="P70Y"),
    ]
    # the median of 1, 5, 9 and 0 is 3
    assert find_subgroups(records, {"a": 1, "b": 5, "c": 9, "d": 0}) == {
        "rare labels": {"1", "4"},
        "frequent labels": {"2", "3"},
        "female": {"1"},
        "male": {"2"},
        "sex unknown": {"3", "4"},
        "under 1 year": {"1"},
        "12 to 17 years": {"2"},
        "18 to 39 years": {"3"},
        "40 years and over": {"4"},
    }


def test_equally_frequent_labels_give_no_frequency_subgroups() -> None:
    assert "rare labels" not in find_subgroups([record("1", "a"), record("2", "b")], {"a": 4, "b": 4})


def test_a_label_without_training_records_is_rare() -> None:
    subgroups = find_subgroups([record("1", "new"), record("2", "b")], {"a": 1, "b": 4})
    assert (subgroups["rare labels"], subgroups["frequent labels"]) == ({"1"}, {"2"})
