from __future__ import annotations

from collections import Counter

import pytest

from mint_ray.loading import UserError
from mint_ray.records import Record
from mint_ray.stages.config import Splits
from mint_ray.stages.prepare import assign_splits


def records(groups: int, per_group: int, labels: int) -> list[Record]:
    return [
        Record(record_id=f"{g}-{i}", group_id=f"g{g}", label_id=f"L{g % labels}")
        for g in range(groups)
        for i in range(per_group)
    ]


def test_a_group_is_in_one_split() -> None:
    split = assign_splits(records(60, 3, 5), Splits())
    of_group: dict[str, set[str]] = {}
    for record in split:
        of_group.setdefault(record.group_id, set()).add(record.split)
    assert all(len(splits) == 1 for splits in of_group.values())


def test_every_label_is_in_every_split_by_its_share() -> None:
    split = assign_splits(records(100, 1, 5), Splits(validation=0.1, test=0.2))
    counts = Counter((record.label_id, record.split) for record in split)
    assert {counts[f"L{i}", "train"] for i in range(5)} == {14}
    assert {counts[f"L{i}", "validation"] for i in range(5)} == {2}
    assert {counts[f"L{i}", "test"] for i in range(5)} == {4}


def test_the_seed_and_not_the_order_of_records_decides() -> None:
    rows = records(40, 2, 4)
    one = {row.record_id: row.split for row in assign_splits(rows, Splits())}
    assert one == {row.record_id: row.split for row in assign_splits(rows[::-1], Splits())}
    assert one != {row.record_id: row.split for row in assign_splits(rows, Splits(seed=1))}


def test_splits_that_came_with_the_records_are_kept_and_checked() -> None:
    rows = [
        Record(record_id="a", group_id="g", label_id="L", split="train"),
        Record(record_id="b", group_id="h", label_id="L", split="test"),
    ]
    assert assign_splits(rows, Splits()) == rows
    crossed = [*rows, Record(record_id="c", group_id="g", label_id="L", split="test")]
    with pytest.raises(UserError, match="record 'c': split: group 'g' is in train and in test"):
        assign_splits(crossed, Splits())
