from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel

from mint_ray.config.loader import UserError
from mint_ray.images import read_images
from mint_ray.records import Label, Phenotype, Record, Split
from mint_ray.teachers import Trainable, Viewer, build_teacher
from mint_ray.teachers.config import Fusion, FusionImage, FusionJoint, FusionText
from mint_ray.teachers.fusion import FusionTeacher
from tests.encoders import SIZE, save_tiny_bert, save_tiny_vilt, save_tiny_vit

LABELS = [Label(label_id=name, name=name) for name in ("same", "other")]
QUICK: dict[str, Any] = {
    "width": 16,
    "dropout": 0.0,
    "epochs": 24,
    "patience": 24,
    "batch_size": 16,
    "learning_rate": 1e-2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("fusion")
    save_tiny_vit(folder / "vit")
    save_tiny_bert(folder / "bert")
    save_tiny_vilt(folder / "vilt")
    random = np.random.default_rng(0)
    for brightness, low in (("dark", 0), ("bright", 150)):
        for number in range(4):
            pixels = random.integers(low, low + 100, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{brightness}{number}.png")
    return folder


def puzzle(folder: Path, count: int = 96) -> list[Record]:
    """Records whose label is whether image and field agree, so that neither of them says anything alone."""
    splits: list[Split] = ["train", "train", "train", "validation"]
    records = []
    for number in range(count):
        bright, high = number % 2 == 0, number // 2 % 2 == 0
        records.append(
            Record(
                record_id=f"r{number}",
                group_id=f"g{number}",
                label_id="same" if bright == high else "other",
                split=splits[number // 4 % 4],
                image_uri=str(folder / f"{'bright' if bright else 'dark'}{number // 16 % 4}.png"),
                fields={"level": "high" if high else "low"},
                text="It was high." if high else "The level that was measured is low.",
            )
        )
    return records


def seeing(folder: Path, **image: Any) -> Fusion:
    return Fusion(
        image=FusionImage(model_id=str(folder / "vit"), copies=2, **image), fields={"level": "category"}, **QUICK
    )


def test_both_parts_together_tell_what_neither_tells_alone(folder: Path) -> None:
    teacher = build_teacher(seeing(folder))
    report = teacher.fit(LABELS, puzzle(folder))
    assert report.counts == {"records_train": 72, "records_validation": 24, "labels": 2} | {
        name: report.counts[name] for name in ("epochs", "best_epoch")
    }
    assert report.metrics["accuracy/all"] == report.metrics["top_1_accuracy"] == 1.0
    assert report.metrics["accuracy/image"] == report.metrics["accuracy/fields"] == 0.5
    assert report.metrics["nll"] <= report.metrics["nll_uncalibrated"]
    scores = teacher.score(puzzle(folder))
    assert all(row.labels[0] == record.label_id for row, record in zip(scores, puzzle(folder), strict=True))
    assert np.exp(scores[0].scores).sum() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("fusion", ["gated", "attention"])
def test_the_other_ways_to_fuse_solve_it_as_well(folder: Path, fusion: str) -> None:
    config = dataclasses.replace(seeing(folder), fusion=fusion)  # type: ignore[arg-type]
    report = build_teacher(config).fit(LABELS, puzzle(folder))
    assert report.metrics["accuracy/all"] == 1.0


def test_an_encoder_that_learns_ends_elsewhere_and_one_that_does_not_is_not_saved(folder: Path, tmp_path: Path) -> None:
    names = {}
    for train in ("frozen", "last:1"):
        config = dataclasses.replace(seeing(folder, train=train), epochs=2)
        teacher = build_teacher(config)
        teacher.fit(LABELS, puzzle(folder, 32))
        place = tmp_path / train
        place.mkdir()
        teacher.save(place)
        names[train] = load_file(place / "weights.safetensors")
        assert {path.name for path in place.iterdir()} == {"weights.safetensors", "fusion.json"}
    assert not any(name.startswith("parts.") for name in names["frozen"])
    learned = {name: tensor for name, tensor in names["last:1"].items() if name.startswith("parts.")}
    published = AutoModel.from_pretrained(folder / "vit").state_dict()
    moved = [
        float((tensor - published[name.removeprefix("parts.image.model.")]).abs().max())
        for name, tensor in learned.items()
    ]
    assert max(moved) > 1e-5


def test_text_and_image_are_read_by_one_encoder_too(folder: Path) -> None:
    joint = FusionJoint(model_id=str(folder / "vilt"), train="last:1", copies=2)
    teacher = build_teacher(Fusion(joint=joint, **QUICK | {"epochs": 2}))
    records = puzzle(folder, 32)
    teacher.fit(LABELS, records)
    assert isinstance(teacher, Viewer)
    whole = records[0]
    partial = [dataclasses.replace(whole, text=None), dataclasses.replace(whole, image_uri=None)]
    scored = teacher.score([whole, *partial])
    assert [row.status for row in scored] == ["ok"] * 3
    assert len({tuple(row.scores) for row in scored}) == 3


def test_what_is_read_ahead_of_it_is_scored_alike(folder: Path) -> None:
    teacher = build_teacher(dataclasses.replace(seeing(folder), epochs=2))
    records = puzzle(folder, 32)
    teacher.fit(LABELS, records)
    assert isinstance(teacher, Viewer)
    images = read_images([record.image_uri for record in records], teacher.frame())
    assert teacher.score_seen(records, images) == teacher.score(records)
    assert not isinstance(build_teacher(Fusion(fields={"level": "category"})), Viewer)


def test_a_record_is_scored_by_what_it_has_and_fails_without_anything_or_with_a_broken_image(
    folder: Path, tmp_path: Path
) -> None:
    teacher = build_teacher(dataclasses.replace(seeing(folder), epochs=2))
    records = puzzle(folder, 32)
    teacher.fit(LABELS, records)
    (tmp_path / "broken.png").write_bytes(b"no image")
    asked = [
        dataclasses.replace(records[0], image_uri=None),
        dataclasses.replace(records[0], fields={}),
        dataclasses.replace(records[0], image_uri=None, fields={}),
        dataclasses.replace(records[0], image_uri=str(tmp_path / "broken.png")),
        dataclasses.replace(records[0], image_uri=str(tmp_path / "none.png")),
    ]
    reasons = [row.reason for row in teacher.score(asked)]
    assert reasons == [None, None, "nothing_to_see", "image_unknown_format", "image_missing"]


def test_records_without_a_usable_label_or_image_are_counted_and_too_many_end_it(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    records = puzzle(folder, 32)
    records[0] = dataclasses.replace(records[0], label_id=None)
    records[1] = dataclasses.replace(records[1], label_id="unheard of")
    records[2] = dataclasses.replace(records[2], image_uri=str(tmp_path / "broken.png"))
    config = dataclasses.replace(seeing(folder), epochs=1)
    report = build_teacher(config).fit(LABELS, records)
    assert report.dropped == {"no_label": 1, "label_not_in_task": 1, "image_unknown_format": 1}
    assert report.counts["records_train"] == 24 - 3
    strict = dataclasses.replace(config, max_bad_share=0.01)
    with pytest.raises(UserError, match=r"broken\.png.* \(1 of 30 records .*max_bad_share 0\.01") as caught:
        build_teacher(strict).fit(LABELS, records)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("strip", "message"),
    [
        (lambda record: dataclasses.replace(record, image_uri=None), "no training record has an image"),
        (lambda record: dataclasses.replace(record, fields={}), "no training record has the field 'level'"),
        (lambda record: dataclasses.replace(record, label_id=None), "no record of the training split has a label"),
    ],
)
def test_what_no_training_record_has_is_named(folder: Path, strip: Callable[[Record], Record], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_teacher(seeing(folder)).fit(LABELS, [strip(record) for record in puzzle(folder, 32)])


class Diary:
    """Keeps every epoch's state, and can end the run after one of them."""

    def __init__(self, folder: Path, found: Path | None = None, ends_after: int | None = None) -> None:
        self.folder, self.found, self.ends_after = folder, found, ends_after
        self.told: list[tuple[int, int]] = []

    def last(self) -> Path | None:
        return self.found

    def tell(self, done: int, whole: int) -> None:
        self.told.append((done, whole))

    def keep(self, save: Callable[[Path], None], epoch: int, epochs: int, note: str) -> None:
        place = self.folder / f"epoch-{epoch}"
        place.mkdir(parents=True)
        save(place)
        if epoch == self.ends_after:
            raise KeyboardInterrupt


def test_a_run_that_was_cut_off_goes_on_to_the_same_end(folder: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(seeing(folder, train="last:1"), epochs=4, dropout=0.3)
    records = puzzle(folder, 32)

    def fresh() -> Trainable:
        teacher = build_teacher(config)
        assert isinstance(teacher, Trainable)
        return teacher

    whole = fresh()
    diary = Diary(tmp_path / "whole")
    expected = whole.train(LABELS, records, diary)
    learned = sum(record.split != "test" for record in records)
    assert diary.told[-1] == (learned, learned)
    with pytest.raises(KeyboardInterrupt):
        fresh().train(LABELS, records, Diary(tmp_path / "first", ends_after=2))
    resumed = fresh()
    report = resumed.train(LABELS, records, Diary(tmp_path / "second", found=tmp_path / "first" / "epoch-2"))
    assert report == expected
    assert [path.name for path in sorted((tmp_path / "second").iterdir())] == ["epoch-3", "epoch-4"]
    assert isinstance(whole, FusionTeacher)
    assert isinstance(resumed, FusionTeacher)
    assert resumed.score(records) == whole.score(records)


def test_text_is_read_by_its_encoder(folder: Path) -> None:
    text = FusionText(model_id=str(folder / "bert"), template="{text}", pooling="mean")
    labels = [Label(label_id=name, name=name) for name in ("high", "low")]
    records = [dataclasses.replace(record, label_id=record.fields["level"]) for record in puzzle(folder)]
    report = build_teacher(Fusion(text=text, **QUICK)).fit(labels, records)
    assert report.metrics["top_1_accuracy"] == 1.0


def test_rare_labels_count_as_much_when_labels_are_balanced() -> None:
    # one finding that says nothing: all that can be learned is how frequent the labels are
    def record(number: int) -> Record:
        return Record(
            record_id=f"r{number}", group_id=f"g{number}", label_id="same" if number % 4 else "other",
            phenotypes=[Phenotype(id="HP:0001250", label="Seizure")],
        )  # fmt: skip

    records = [record(number) for number in range(64)]
    found = {}
    for balanced in (True, False):
        teacher = build_teacher(
            Fusion(findings=True, class_balanced=balanced, **QUICK | {"epochs": 30, "learning_rate": 3e-2})
        )
        teacher.fit(LABELS, records)
        row = teacher.score(records[:1])[0]
        found[balanced] = dict(zip(row.labels, np.exp(row.scores), strict=True))["same"]
    assert found[True] == pytest.approx(0.5, abs=0.06)
    assert found[False] == pytest.approx(0.75, abs=0.06)


def test_its_identity_is_that_of_the_encoders(folder: Path) -> None:
    inputs = build_teacher(seeing(folder)).inputs()
    assert list(inputs) == ["image"]
    changed = folder.parent / "changed"
    save_tiny_vit(changed / "vit")
    (changed / "vit" / "preprocessor_config.json").write_text(json.dumps({"size": 16}))
    assert build_teacher(seeing(changed)).inputs() != inputs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "it is to read nothing"),
        ({"findings": True, "width": 0}, "width must be positive, got 0"),
        ({"findings": True, "dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"image": {"train": "some"}}, "train must be frozen, all or last:N, got 'some'"),
        ({"image": {}, "joint": {"model_id": "m"}}, "joint reads image and text itself"),
        ({"text": {"template": "{gene}"}}, "{gene} is no part of a record"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    from mint_ray.config.loader import from_data

    with pytest.raises(UserError) as caught:
        from_data(Fusion, settings)
    assert message in str(caught.value)


def test_an_unknown_bundled_encoder_is_answered_with_the_nearest() -> None:
    config = Fusion(image=FusionImage(model_id="bundled:efficientnet"))
    with pytest.raises(UserError, match=r"no bundled vision encoder .*did you mean 'bundled:efficientnet-lite0'"):
        build_teacher(config).inputs()
