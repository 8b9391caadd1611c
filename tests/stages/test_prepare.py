"""Records are read, their labels chosen, and their groups assigned to splits; images are stored with them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mint_ray.artifacts import verify
from mint_ray.config.loader import UserError
from mint_ray.config.stages import Prepare, Splits
from mint_ray.images import Frame, read_image
from mint_ray.records import Record
from mint_ray.sources.config import PanNuke
from mint_ray.stages import prepare as module
from mint_ray.stages.prepare import assign_splits, prepare_records
from mint_ray.tasks.config import TissueType
from tests.sources.histology import save_fold

TISSUES = ["Breast", "Colon", "Liver", "Breast", "Skin", "Colon", "Liver"]
FRAME = Frame(size=64)


@pytest.fixture
def folds(tmp_path: Path) -> dict[str, np.ndarray]:
    return {
        fold: save_fold(tmp_path / "pannuke" / fold, TISSUES[number:], size=64)
        for number, fold in enumerate(("fold1", "fold2", "fold3"))
    }


def settings(folder: Path, **changes: object) -> Prepare:
    return Prepare(source=PanNuke(uri=str(folder / "pannuke")), **changes)


def records(groups: int, per_group: int, labels: int) -> list[Record]:
    return [
        Record(record_id=f"{g}-{i}", group_id=f"g{g}", label_id=f"L{g % labels}")
        for g in range(groups)
        for i in range(per_group)
    ]


def test_a_group_is_in_one_split() -> None:
    splits_of: dict[str, set[str]] = {}
    for record in assign_splits(records(60, 3, 5), Splits()):
        splits_of.setdefault(record.group_id, set()).add(record.split)
    assert all(len(splits) == 1 for splits in splits_of.values())


def test_every_label_is_in_every_split_in_proportion_to_its_share() -> None:
    split = assign_splits(records(100, 1, 5), Splits(validation=0.1, test=0.2))
    counts = Counter((record.label_id, record.split) for record in split)
    assert {counts[f"L{i}", "train"] for i in range(5)} == {14}
    assert {counts[f"L{i}", "validation"] for i in range(5)} == {2}
    assert {counts[f"L{i}", "test"] for i in range(5)} == {4}


def test_splits_depend_on_the_seed_and_not_on_the_order_of_records() -> None:
    rows = records(40, 2, 4)
    one = {row.record_id: row.split for row in assign_splits(rows, Splits())}
    assert one == {row.record_id: row.split for row in assign_splits(rows[::-1], Splits())}
    assert one != {row.record_id: row.split for row in assign_splits(rows, Splits(seed=1))}


def test_splits_of_the_source_are_kept_and_checked() -> None:
    rows = [
        Record(record_id="a", group_id="g", label_id="L", split="train"),
        Record(record_id="b", group_id="h", label_id="L", split="test"),
    ]
    assert assign_splits(rows, Splits()) == rows
    in_two_splits = [*rows, Record(record_id="c", group_id="g", label_id="L", split="test")]
    with pytest.raises(UserError, match="record 'c': split: group 'g' is in train and in test"):
        assign_splits(in_two_splits, Splits())


def test_images_that_are_not_files_of_their_own_are_stored_with_the_records(
    tmp_path: Path, folds: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IMAGES_PER_ROW_GROUP", 2)
    prepared = prepare_records(str(tmp_path / "out"), settings(tmp_path, rows_per_part=5), TissueType())
    rows = prepared.rows(Record, "records")
    assert len(rows) == 7 + 6 + 5
    for row in rows:
        fold, index = row.record_id.split("_")
        assert np.array_equal(read_image(str(row.image_uri), FRAME), folds[fold][int(index)])
    # parts of the same length as those of the records, in row groups of a few images
    files = prepared.table_files("images")
    assert [file.rows for file in files] == [file.rows for file in prepared.table_files("records")] == [5, 5, 5, 3]
    assert pq.read_metadata(prepared.file_uri(files[0].path)).row_group(0).num_rows == 2
    assert verify(prepared.uri) == []


def test_a_record_whose_image_cannot_be_read_is_left_out_and_counted(
    tmp_path: Path, folds: dict[str, np.ndarray]
) -> None:
    folds["fold2"][3] = np.nan
    np.save(tmp_path / "pannuke" / "fold2" / "images" / "fold2" / "images.npy", folds["fold2"])
    prepared = prepare_records(str(tmp_path / "out"), settings(tmp_path, max_bad_share=0.1), TissueType())
    assert prepared.manifest.dropped["image_out_of_range"] == 1
    assert prepared.manifest.counts["records_validation"] == 5
    for row in prepared.rows(Record, "records"):
        fold, index = row.record_id.split("_")
        assert np.array_equal(read_image(str(row.image_uri), FRAME), folds[fold][int(index)])
    with pytest.raises(UserError, match=r"images\.npy:3: .*1 of 18 images are bad, more than max_bad_share 0\.05"):
        prepare_records(str(tmp_path / "out"), settings(tmp_path), TissueType())
