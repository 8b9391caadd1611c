"""Each record is shown the image of another one of its split, and nothing else of it is changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_args

from mint_ray.artifacts import open_artifact, verify
from mint_ray.records import Label, Record, Split
from mint_ray.stages.shuffle_images import permute_images, shuffle_images

ROWS = [
    Record(
        record_id=f"r{number:03d}", group_id=f"g{number // 2}", label_id=f"L{number % 4}",
        split=get_args(Split)[number % 3], image_uri=None if number == 7 else f"{number}.png", fields={"age": "4"},
    )
    for number in range(60)
]  # fmt: skip


def test_images_are_permuted_within_each_split_and_none_stays() -> None:
    moved = permute_images(ROWS)
    for split in get_args(Split):
        own = {row.record_id: row.image_uri for row in ROWS if row.split == split and row.image_uri}
        assert sorted(moved[record_id] for record_id in own) == sorted(own.values())
        assert not any(moved[record_id] == uri for record_id, uri in own.items())
    assert "r007" not in moved


def test_what_an_image_shows_no_longer_tells_the_label() -> None:
    rows = [dataclasses.replace(row, image_uri=f"{row.label_id}-{row.record_id}", split="train") for row in ROWS] + [
        Record(record_id=f"s{number}", group_id="g", label_id=f"L{number % 4}", image_uri=f"L{number % 4}-s{number}")
        for number in range(2_000)
    ]
    moved = permute_images(rows)
    agree = sum(moved[row.record_id].startswith(f"{row.label_id}-") for row in rows) / len(rows)
    assert abs(agree - 0.25) < 0.04  # four deviations of a quarter of 2,060


def test_the_order_of_the_records_does_not_matter() -> None:
    assert permute_images(ROWS) == permute_images(ROWS[::-1])


def test_the_artifact_has_the_parts_and_all_else_of_the_records(tmp_path: Path) -> None:
    records = open_artifact(str(tmp_path), "prepare", {}, {})
    with records.write() as draft:
        draft.write_rows(Record, "records", ROWS, rows_per_part=25)
        draft.write_rows(Label, "labels", [Label(label_id=f"L{number}", name=f"name {number}") for number in range(4)])
        draft.counts["records_train"] = 20
    shuffled = shuffle_images(str(tmp_path), records)
    assert verify(shuffled.uri) == []
    ours, theirs = (
        [(file.path, file.rows) for file in artifact.table_files("records")] for artifact in (shuffled, records)
    )
    assert ours == theirs
    rows = shuffled.rows(Record, "records")
    assert [dataclasses.replace(row, image_uri=None) for row in rows] == [
        dataclasses.replace(row, image_uri=None) for row in ROWS
    ]
    assert {row.record_id: row.image_uri for row in rows if row.image_uri} == permute_images(ROWS)
    assert shuffled.rows(Label, "labels") == records.rows(Label, "labels")
    assert (shuffled.manifest.counts["records_train"], shuffled.manifest.counts["images_moved"]) == (20, 59)
    assert shuffle_images(str(tmp_path), records).manifest == shuffled.manifest
