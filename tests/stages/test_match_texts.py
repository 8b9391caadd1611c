"""Images are given the nearest text of their split, without their labels."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoTokenizer

from mint_ray.artifacts import Artifact, verify
from mint_ray.config.loader import UserError
from mint_ray.config.stages import ImageActorResources, Prepare
from mint_ray.records import Label, Record
from mint_ray.stages import embed_texts as embed_module
from mint_ray.stages import match_texts as module
from mint_ray.stages.embed_texts import embed_texts, fold
from mint_ray.stages.match_texts import check_texts, find_nearest, match_texts
from mint_ray.stages.prepare import prepare_records, select_records
from mint_ray.tasks.config import AnyTask, RareDisease
from tests.stages.inputs import map_parts_here
from tests.stages.matching import (
    BROKEN,
    HAS_TEXT,
    IMAGE_TASK,
    LABELS,
    MISSING,
    NO_IMAGE,
    NUM_IMAGES,
    NUM_TEXTS,
    candidate_texts,
    matching_config,
    write_images,
    write_matching_data,
    write_rows,
)
from tests.teachers.tiny_clip import MEAN, STD, TOKENS, save_tiny_clip
from tests.tiny import save_tiny_student

UNMATCHED = (BROKEN, MISSING, HAS_TEXT, NO_IMAGE)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_matching_data(tmp_path_factory.mktemp("data"))


def match(root: Path, config: Prepare, task: AnyTask = IMAGE_TASK) -> Artifact:
    """Run the three stages on this machine's Ray."""
    records = prepare_records(str(root), config, task)
    return match_texts(str(root), config, task, records, embed_texts(str(root), config, records))


def match_here(root: Path, config: Prepare, task: AnyTask = IMAGE_TASK) -> Artifact:
    """Run the three stages in this process, without Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed_module, "map_parts", map_parts_here)
        patch.setattr(module, "map_parts", map_parts_here)
        return match(root, config, task)


@pytest.fixture(scope="module")
def matched(data: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return match_here(tmp_path_factory.mktemp("root"), matching_config(data, clip))


@torch.no_grad()
def compare_one_by_one(clip: Path, images: list[str], texts: list[str]) -> torch.Tensor:
    """Return the cosine of each image and each text, as the published model computes it."""
    model, tokenizer = AutoModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    image_features, text_features = [], []
    for image in images:
        values = (np.asarray(Image.open(image)).astype(np.float64) / 255 - MEAN) / STD
        pixels = torch.tensor(values, dtype=torch.float32).permute(2, 0, 1)[None]
        image_features.append(model.get_image_features(pixel_values=pixels).pooler_output)
    for text in texts:
        tokens = tokenizer([text], padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        text_features.append(model.get_text_features(**tokens).pooler_output)
    return torch.nn.functional.cosine_similarity(torch.stack(image_features), torch.cat(text_features)[None], dim=-1)


def test_each_image_gets_the_text_that_the_model_itself_finds_nearest_in_its_split(
    matched: Artifact, data: Path, clip: Path
) -> None:
    texts = candidate_texts(data, clip)
    records = [record for record in matched.rows(Record, "records") if "text_id" in record.fields]
    assert len(records) == NUM_IMAGES - len(UNMATCHED)
    cosines = compare_one_by_one(clip, [record.image_uri or "" for record in records], [text.text for text in texts])
    for record, row in zip(records, cosines.tolist(), strict=True):
        similar = {text: value for text, value in zip(texts, row, strict=True) if text.split == record.split}
        best = max(similar, key=lambda text: similar[text])
        assert record.fields["text_id"] == best.text_id
        assert record.text == best.text
        assert float(record.fields["text_similarity"]) == pytest.approx(similar[best], abs=1e-4)
    assert len({record.fields["text_id"] for record in records}) > 3


def test_other_records_and_those_with_an_unreadable_image_stay_as_they_were(
    matched: Artifact, data: Path, clip: Path
) -> None:
    before = select_records(matching_config(data, clip), IMAGE_TASK).records
    after = matched.rows(Record, "records")
    for number in UNMATCHED:
        assert after[number] == before[number]
    for old, new in zip(before, after, strict=True):
        assert dataclasses.replace(new, text=old.text, fields=old.fields) == old
    assert matched.manifest.dropped["without text: image_missing"] == 1
    assert matched.manifest.dropped["without text: image_unknown_format"] == 1
    assert [file.rows for file in matched.table_files("records")] == [6, 6, 4]
    assert [label.label_id for label in matched.rows(Label, "labels")] == list(LABELS)
    assert verify(matched.uri) == []


def test_matches_are_counted(matched: Artifact) -> None:
    counts = matched.manifest.counts
    records = [record for record in matched.rows(Record, "records") if "text_id" in record.fields]
    assert counts["records_matched"] == len(records)
    assert counts["texts_used"] == len({record.fields["text_id"] for record in records})
    assert (counts["records_train"], counts["records_validation"], counts["records_test"]) == (8, 4, 4)
    assert (counts["texts"], counts["groups"], counts["labels"]) == (NUM_TEXTS, NUM_IMAGES, 3)
    assert matched.manifest.dropped["texts: same_wording"] == 2
    assert matched.manifest.dropped["texts: no_text"] == 1
    cosines = [float(record.fields["text_similarity"]) for record in records]
    assert matched.manifest.metrics["text_similarity"]["mean"] == pytest.approx(np.mean(cosines), abs=1e-4)


def test_no_wording_is_in_records_of_two_splits(matched: Artifact) -> None:
    splits: dict[str, set[str]] = {}
    for record in matched.rows(Record, "records"):
        if record.text is not None:
            splits.setdefault(fold(record.text), set()).add(record.split)
    assert all(len(found) == 1 for found in splits.values())


def test_the_first_of_equally_near_texts_is_taken() -> None:
    texts_MD = np.array([[0.0, 1.0], [0.6, 0.8], [1.0, 0.0], [0.6, 0.8 + 1e-9]])
    images_ND = np.array([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0], [np.sqrt(0.5), -np.sqrt(0.5)]])
    indices, cosines = find_nearest(images_ND, texts_MD)
    assert indices == [1, 2, 0, 2]
    assert cosines == pytest.approx([1, 1, 1, np.sqrt(0.5)], abs=1e-6)


def test_the_nearest_text_does_not_depend_on_the_images_compared_at_a_time() -> None:
    rng = np.random.default_rng(0)
    images_ND, texts_MD = rng.normal(size=(150, 8)), rng.normal(size=(31, 8))
    indices, _ = find_nearest(images_ND, texts_MD)
    assert indices == [int(np.argmax([image_D @ text_D for text_D in texts_MD])) for image_D in images_ND]


@pytest.mark.ray
def test_a_pool_of_actors_writes_the_same_rows_as_one_process(
    ray_cluster: None, matched: Artifact, data: Path, clip: Path, tmp_path: Path
) -> None:
    resources = ImageActorResources(actors=2, cpus_per_actor=0.5, decode_cpus=0.25, decode_tasks=2)
    pooled = match(tmp_path, matching_config(data, clip, resources=resources))
    assert pooled.name == matched.name
    assert pooled.rows(Record, "records") == matched.rows(Record, "records")
    assert pooled.manifest.counts == matched.manifest.counts
    assert verify(pooled.uri) == []


def test_labels_do_not_change_a_text_and_a_minimum_leaves_out_texts_below_it(
    matched: Artifact, data: Path, clip: Path, tmp_path: Path
) -> None:
    write_images(data, {number: LABELS[(number * 7 + 1) % 3] for number in range(NUM_IMAGES)}, "relabelled.jsonl")
    before = matched.rows(Record, "records")
    cosines = sorted(float(record.fields["text_similarity"]) for record in before if record.fields)
    minimum = (cosines[3] + cosines[4]) / 2
    other = match_here(tmp_path, matching_config(data, clip, images="relabelled.jsonl", min_similarity=minimum))
    after = other.rows(Record, "records")
    assert [record.label_id for record in after] != [record.label_id for record in before]
    for old, new in zip(before, after, strict=True):
        is_near = bool(old.fields) and float(old.fields["text_similarity"]) >= minimum
        kept = (old.text, old.fields) if is_near or not old.fields else (None, {})
        assert (new.text, new.fields) == kept
    assert other.manifest.dropped["without text: below_min_similarity"] == 4


def test_a_record_whose_new_text_names_its_label_is_dropped(clip: Path, tmp_path: Path) -> None:
    write_images(tmp_path, {number: "OMIM:163950" if number % 2 else "OMIM:130070" for number in range(NUM_IMAGES)})
    rows = [json.loads(line) for line in (tmp_path / "images.jsonl").read_text().splitlines()]
    for row in rows:
        row["label_name"] = "Noonan syndrome" if row["label_id"] == "OMIM:163950" else "Marfan syndrome"
    write_rows(tmp_path / "images.jsonl", rows)
    texts = [{"record_id": f"t{i:02d}", "text": f"A child with Noonan syndrome, seen {i} times."} for i in range(20)]
    write_rows(tmp_path / "texts.jsonl", texts)
    found = match_here(tmp_path / "root", matching_config(tmp_path, clip), RareDisease())
    dropped = [f"r{n:02d}" for n in range(NUM_IMAGES) if n % 2 and n not in UNMATCHED]
    kept = [row["record_id"] for row in rows if row["record_id"] not in dropped]
    assert [record.record_id for record in found.rows(Record, "records")] == kept
    assert found.manifest.dropped["note_names_diagnosis"] == len(dropped)


def test_a_split_whose_records_are_all_dropped_is_an_error(clip: Path, tmp_path: Path) -> None:
    write_images(tmp_path, dict.fromkeys(range(NUM_IMAGES), "OMIM:163950"))
    rows = [json.loads(line) for line in (tmp_path / "images.jsonl").read_text().splitlines()]
    rows = [row | {"label_name": "Noonan syndrome"} for row in rows if row["record_id"] != f"r{BROKEN:02d}"]
    write_rows(tmp_path / "images.jsonl", rows)
    texts = [{"record_id": f"t{i:02d}", "text": f"A child with Noonan syndrome, seen {i} times."} for i in range(20)]
    write_rows(tmp_path / "texts.jsonl", texts)
    with pytest.raises(UserError, match=r"every record of the validation split got a text that names its label$"):
        match_here(tmp_path / "root", matching_config(tmp_path, clip), RareDisease())


def test_an_unknown_encoder_and_one_without_two_towers_are_named_before_any_work(data: Path, tmp_path: Path) -> None:
    missing, llama = (
        matching_config(data, folder).match_texts
        for folder in (tmp_path / "missing", save_tiny_student(tmp_path / "llama"))
    )
    assert missing is not None
    assert llama is not None
    with pytest.raises(UserError, match=r"^prepare\.match_texts: model_id: no folder '.*missing'"):
        check_texts(missing)
    with pytest.raises(UserError, match="llama is not a CLIP-like model: no vision_config"):
        check_texts(llama)
