"""Each record gets the image of another record of its split; everything else stays the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mint_ray.artifacts import verify
from mint_ray.records import SPLITS, Label, Record
from mint_ray.stages.shuffle_images import permute_images, shuffle_images
from tests.stages.inputs import write_records

ROWS = [
    Record(
        record_id=f"r{number:03d}", group_id=f"g{number // 2}", label_id=f"L{number % 4}",
        split=SPLITS[number % 3], image_uri=None if number == 7 else f"{number}.png", fields={"age": "4"},
    )
    for number in range(60)
]  # fmt: skip
LABELS = [Label(label_id=f"L{number}", name=f"name {number}") for number in range(4)]


def test_images_are_permuted_within_each_split_and_no_record_keeps_its_own() -> None:
    images = permute_images(ROWS)
    for split in SPLITS:
        own = {row.record_id: row.image_uri for row in ROWS if row.split == split and row.image_uri}
        assert sorted(images[record_id] for record_id in own) == sorted(own.values())
        assert not any(images[record_id] == uri for record_id, uri in own.items())
    assert "r007" not in images


def test_an_image_is_independent_of_the_label() -> None:
    rows = [dataclasses.replace(row, image_uri=f"{row.label_id}-{row.record_id}", split="train") for row in ROWS] + [
        Record(record_id=f"s{number}", group_id="g", label_id=f"L{number % 4}", image_uri=f"L{number % 4}-s{number}")
        for number in range(2_000)
    ]
    images = permute_images(rows)
    share = sum(images[row.record_id].startswith(f"{row.label_id}-") for row in rows) / len(rows)
    assert abs(share - 0.25) < 0.04  # four standard deviations of 2,060 draws


def test_the_order_of_the_records_does_not_matter() -> None:
    assert permute_images(ROWS) == permute_images(ROWS[::-1])


def test_the_artifact_has_the_parts_and_the_other_fields_of_the_records(tmp_path: Path) -> None:
    records = write_records(tmp_path, ROWS, LABELS, rows_per_part=25)
    shuffled = shuffle_images(str(tmp_path), records)
    assert verify(shuffled.uri) == []
    after, before = (
        [(file.path, file.rows) for file in artifact.table_files("records")] for artifact in (shuffled, records)
    )
    assert after == before
    rows = shuffled.rows(Record, "records")
    assert [dataclasses.replace(row, image_uri=None) for row in rows] == [
        dataclasses.replace(row, image_uri=None) for row in ROWS
    ]
    assert {row.record_id: row.image_uri for row in rows if row.image_uri} == permute_images(ROWS)
    assert shuffled.rows(Label, "labels") == records.rows(Label, "labels")
    assert shuffled.manifest.counts == records.manifest.counts | {"images_exchanged": 59}
    assert shuffle_images(str(tmp_path), records).manifest == shuffled.manifest
