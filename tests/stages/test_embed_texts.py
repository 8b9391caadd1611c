"""Texts that images can be given: each wording once, no wording or group in two splits, and their embeddings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from mint_ray.artifacts import Artifact, verify
from mint_ray.config.loader import UserError
from mint_ray.config.stages import Splits
from mint_ray.records import CandidateText, TextEmbedding
from mint_ray.sources.config import Table
from mint_ray.stages import embed_texts as module
from mint_ray.stages.embed_texts import draw_split, embed_texts, fold, select_texts
from mint_ray.stages.prepare import prepare_records, select_records
from mint_ray.teachers.config import TwoTower
from mint_ray.teachers.two_tower import TwoTowerEncoder
from tests.stages.inputs import map_parts_here
from tests.stages.matching import (
    IMAGE_TASK,
    NUM_IMAGES,
    NUM_TEXTS,
    SPLITS,
    candidate_texts,
    matching_config,
    with_source,
    write_matching_data,
    write_rows,
    write_texts,
)
from tests.teachers.tiny_clip import save_tiny_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_matching_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def embedded(data: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    root, config = str(tmp_path_factory.mktemp("root")), matching_config(data, clip)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "map_parts", map_parts_here)
        return embed_texts(root, config, prepare_records(root, config, IMAGE_TASK))


def test_each_text_has_the_embedding_of_the_encoder_in_parallel_parts(
    embedded: Artifact, data: Path, clip: Path
) -> None:
    texts, embeddings = embedded.rows(CandidateText, "texts"), embedded.rows(TextEmbedding, "embeddings")
    assert texts == candidate_texts(data, clip)
    assert [(row.text_id, row.split) for row in embeddings] == [(text.text_id, text.split) for text in texts]
    encoder = TwoTowerEncoder(TwoTower(model_id=str(clip)))
    vectors = list(encoder.encode_texts([text.text for text in texts]))
    np.testing.assert_allclose([row.vector for row in embeddings], vectors, atol=1e-6)
    rows = [[file.rows for file in embedded.table_files(table)] for table in ("texts", "embeddings")]
    assert rows[0] == rows[1] == [6] * 6 + [4]
    assert verify(embedded.uri) == []


def test_texts_and_skipped_rows_are_counted(embedded: Artifact) -> None:
    counts = embedded.manifest.counts
    assert counts["texts"] == NUM_TEXTS == sum(counts[f"texts_{split}"] for split in set(SPLITS))
    assert embedded.manifest.dropped == {"no_text": 1, "same_wording": 2}


def test_no_wording_and_no_group_of_texts_is_in_two_splits(data: Path, clip: Path) -> None:
    splits: dict[str, set[str]] = {}
    for text in candidate_texts(data, clip):
        splits.setdefault(text.group_id, set()).add(text.split)
        splits.setdefault(fold(text.text), set()).add(text.split)
    assert all(len(found) == 1 for found in splits.values())


def test_groups_of_texts_are_assigned_by_name_and_seed_in_the_given_shares() -> None:
    names = [f"p{number}" for number in range(4000)]
    shares = Splits(validation=0.1, test=0.3)
    drawn = [draw_split(name, shares, 0) for name in names]
    assert drawn.count("validation") / 4000 == pytest.approx(0.1, abs=0.02)
    assert drawn.count("test") / 4000 == pytest.approx(0.3, abs=0.03)
    assert drawn != [draw_split(name, shares, 1) for name in names]


def test_a_group_of_texts_that_also_has_records_is_in_their_split(data: Path, clip: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in write_texts(tmp_path).read_text().splitlines()]
    for number, row in enumerate(rows[:NUM_IMAGES]):
        row["group_id"] = f"g{number}"
    write_rows(tmp_path / "texts.jsonl", rows)
    config = with_source(matching_config(data, clip), Table(uri=str(tmp_path / "texts.jsonl")))
    texts, _ = select_texts(config, select_records(config, IMAGE_TASK).records)
    assert [text.split for text in texts[:NUM_IMAGES]] == [SPLITS[number % 4] for number in range(NUM_IMAGES)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, r"^prepare\.match_texts: .*ages\.csv:2: record 'a' .* \(1 of 1 rows are bad, more than max_bad_share"),
        ({"fields.age": "age"}, r"^prepare\.match_texts: .*ages\.csv: text: none of its 1 rows has one$"),
        ({"text": "report"}, r"ages\.csv: no column 'report'; found record_id, age$"),
    ],
)
def test_a_source_without_texts_is_named(
    data: Path, clip: Path, tmp_path: Path, columns: dict[str, str], message: str
) -> None:
    (tmp_path / "ages.csv").write_text("record_id,age\na,P3Y\n")
    source = Table(uri=str(tmp_path / "ages.csv"), columns=columns)
    config = with_source(matching_config(data, clip), source)
    with pytest.raises(UserError, match=message):
        select_texts(config, select_records(config, IMAGE_TASK).records)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fields": {"text_id": "x"}}, r"record 'r00': fields\.text_id: already set to 'x'; this name is reserved"),
        ({"text": "t"}, r"no record has an image and no text, so there is nothing to match"),
    ],
)
def test_records_that_cannot_get_a_text_are_named(
    data: Path, clip: Path, changes: dict[str, object], message: str
) -> None:
    config = matching_config(data, clip)
    records = [dataclasses.replace(row, **changes) for row in select_records(config, IMAGE_TASK).records]  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        select_texts(config, records)


def test_a_split_without_texts_is_named(data: Path, clip: Path) -> None:
    config = dataclasses.replace(matching_config(data, clip), splits=Splits(validation=0, test=0.3))
    with pytest.raises(UserError, match="texts is in the validation split, whose 4 records need some"):
        select_texts(config, select_records(config, IMAGE_TASK).records)
