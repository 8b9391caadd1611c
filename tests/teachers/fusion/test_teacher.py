"""A fusion teacher learns from all modalities, and resumes, scores and fails as documented."""

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
from mint_ray.teachers import ImageTeacher, TrainableTeacher, build_teacher, teacher_inputs
from mint_ray.teachers.config import Fusion, FusionImage, FusionJoint, FusionText
from mint_ray.teachers.fusion import FusionTeacher
from tests.encoders import SIZE, save_tiny_bert, save_tiny_vilt, save_tiny_vit

LABELS = [Label(label_id=name, name=name) for name in ("same", "other")]
QUICK: dict[str, Any] = {
    "hidden_size": 16,
    "dropout": 0.0,
    "num_train_epochs": 24,
    "early_stopping_patience": 24,
    "train_batch_size": 16,
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


def xor_records(folder: Path, count: int = 96) -> list[Record]:
    """Return records whose label says whether image and field agree, so that neither predicts it alone."""
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


def image_config(folder: Path, **image: Any) -> Fusion:
    return Fusion(
        image=FusionImage(model_id=str(folder / "vit"), num_augmentations=2, **image),
        fields={"level": "category"},
        **QUICK,
    )


def test_both_modalities_together_predict_what_neither_does_alone(folder: Path) -> None:
    teacher = build_teacher(image_config(folder))
    report = teacher.fit(LABELS, xor_records(folder))
    assert report.counts == {"records_train": 72, "records_validation": 24, "labels": 2} | {
        name: report.counts[name] for name in ("epochs", "best_epoch")
    }
    assert report.metrics["accuracy/all"] == report.metrics["top_1_accuracy"] == 1.0
    assert report.metrics["accuracy/image"] == report.metrics["accuracy/fields"] == 0.5
    assert report.metrics["nll"] <= report.metrics["nll_uncalibrated"]
    scores = teacher.score(xor_records(folder))
    assert all(row.labels[0] == record.label_id for row, record in zip(scores, xor_records(folder), strict=True))
    assert np.exp(scores[0].scores).sum() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("fusion", ["gated", "attention"])
def test_the_other_fusion_methods_learn_it_too(folder: Path, fusion: str) -> None:
    config = dataclasses.replace(image_config(folder), fusion=fusion)  # type: ignore[arg-type]
    report = build_teacher(config).fit(LABELS, xor_records(folder))
    assert report.metrics["accuracy/all"] == 1.0


def test_a_trained_encoder_changes_and_is_saved_and_a_frozen_one_is_not(folder: Path, tmp_path: Path) -> None:
    names = {}
    for trainable in ("frozen", "last:1"):
        config = dataclasses.replace(image_config(folder, trainable=trainable), num_train_epochs=2)
        teacher = build_teacher(config)
        teacher.fit(LABELS, xor_records(folder, 32))
        saved = tmp_path / trainable
        saved.mkdir()
        teacher.save(saved)
        names[trainable] = load_file(saved / "weights.safetensors")
        assert {path.name for path in saved.iterdir()} == {"weights.safetensors", "fusion.json"}
    assert not any(name.startswith("encoders.") for name in names["frozen"])
    trained = {name: tensor for name, tensor in names["last:1"].items() if name.startswith("encoders.")}
    published = AutoModel.from_pretrained(folder / "vit").state_dict()
    changes = [
        float((tensor - published[name.removeprefix("encoders.image.model.")]).abs().max())
        for name, tensor in trained.items()
    ]
    assert max(changes) > 1e-5


def test_a_joint_encoder_reads_text_and_image(folder: Path) -> None:
    joint = FusionJoint(model_id=str(folder / "vilt"), trainable="last:1", num_augmentations=2)
    teacher = build_teacher(Fusion(joint=joint, **QUICK | {"num_train_epochs": 2}))
    records = xor_records(folder, 32)
    teacher.fit(LABELS, records)
    assert isinstance(teacher, ImageTeacher)
    both = records[0]
    partial = [dataclasses.replace(both, text=None), dataclasses.replace(both, image_uri=None)]
    scored = teacher.score([both, *partial])
    assert [row.status for row in scored] == ["ok"] * 3
    assert len({tuple(row.scores) for row in scored}) == 3


def test_decoded_images_get_the_same_scores(folder: Path) -> None:
    teacher = build_teacher(dataclasses.replace(image_config(folder), num_train_epochs=2))
    records = xor_records(folder, 32)
    teacher.fit(LABELS, records)
    assert isinstance(teacher, ImageTeacher)
    images = read_images([record.image_uri for record in records], teacher.frame())
    assert teacher.score_images(records, images) == teacher.score(records)
    assert not isinstance(build_teacher(Fusion(fields={"level": "category"})), ImageTeacher)


def test_a_record_is_scored_by_the_modalities_it_has_and_fails_without_any_or_with_a_broken_image(
    folder: Path, tmp_path: Path
) -> None:
    teacher = build_teacher(dataclasses.replace(image_config(folder), num_train_epochs=2))
    records = xor_records(folder, 32)
    teacher.fit(LABELS, records)
    (tmp_path / "broken.png").write_bytes(b"no image")
    partial = [
        dataclasses.replace(records[0], image_uri=None),
        dataclasses.replace(records[0], fields={}),
        dataclasses.replace(records[0], image_uri=None, fields={}),
        dataclasses.replace(records[0], image_uri=str(tmp_path / "broken.png")),
        dataclasses.replace(records[0], image_uri=str(tmp_path / "none.png")),
    ]
    reasons = [row.reason for row in teacher.score(partial)]
    assert reasons == [None, None, "no_input", "image_unknown_format", "image_missing"]


def test_records_without_a_known_label_or_readable_image_are_counted_and_too_many_are_an_error(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    records = xor_records(folder, 32)
    records[0] = dataclasses.replace(records[0], label_id=None)
    records[1] = dataclasses.replace(records[1], label_id="unknown")
    records[2] = dataclasses.replace(records[2], image_uri=str(tmp_path / "broken.png"))
    config = dataclasses.replace(image_config(folder), num_train_epochs=1)
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
        (
            lambda record: dataclasses.replace(record, label_id=None),
            "no record of the training split has a label of the task",
        ),
    ],
)
def test_an_input_that_no_training_record_has_is_named(
    folder: Path, strip: Callable[[Record], Record], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build_teacher(image_config(folder)).fit(LABELS, [strip(record) for record in xor_records(folder, 32)])


class EpochCheckpoints:
    """Checkpointer that keeps every epoch's state, and can interrupt the run after one of them."""

    def __init__(self, folder: Path, checkpoint: Path | None = None, stop_after: int | None = None) -> None:
        self.folder, self.checkpoint, self.stop_after = folder, checkpoint, stop_after
        self.progress: list[tuple[int, int]] = []

    def resume_from(self) -> Path | None:
        return self.checkpoint

    def report_progress(self, done: int, total: int) -> None:
        self.progress.append((done, total))

    def save_checkpoint(self, save: Callable[[Path], None], epoch: int, num_epochs: int, message: str) -> None:
        folder = self.folder / f"epoch-{epoch}"
        folder.mkdir(parents=True)
        save(folder)
        if epoch == self.stop_after:
            raise KeyboardInterrupt


def test_an_interrupted_run_resumes_to_the_same_result(folder: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(image_config(folder, trainable="last:1"), num_train_epochs=4, dropout=0.3)
    records = xor_records(folder, 32)

    def build() -> TrainableTeacher:
        teacher = build_teacher(config)
        assert isinstance(teacher, TrainableTeacher)
        return teacher

    uninterrupted = build()
    checkpoints = EpochCheckpoints(tmp_path / "uninterrupted")
    expected = uninterrupted.train(LABELS, records, checkpoints)
    num_records = sum(record.split != "test" for record in records)
    assert checkpoints.progress[-1] == (num_records, num_records)
    with pytest.raises(KeyboardInterrupt):
        build().train(LABELS, records, EpochCheckpoints(tmp_path / "first", stop_after=2))
    resumed = build()
    report = resumed.train(
        LABELS, records, EpochCheckpoints(tmp_path / "second", checkpoint=tmp_path / "first" / "epoch-2")
    )
    assert report == expected
    assert [path.name for path in sorted((tmp_path / "second").iterdir())] == ["epoch-3", "epoch-4"]
    assert isinstance(uninterrupted, FusionTeacher)
    assert isinstance(resumed, FusionTeacher)
    assert resumed.score(records) == uninterrupted.score(records)


def test_a_text_encoder_reads_the_text(folder: Path) -> None:
    text = FusionText(model_id=str(folder / "bert"), template="{text}", pooling="mean")
    labels = [Label(label_id=name, name=name) for name in ("high", "low")]
    records = [dataclasses.replace(record, label_id=record.fields["level"]) for record in xor_records(folder)]
    report = build_teacher(Fusion(text=text, **QUICK)).fit(labels, records)
    assert report.metrics["top_1_accuracy"] == 1.0


def test_balanced_labels_have_equal_weight() -> None:
    # one phenotype in all records: only the frequency of the labels can be learned
    def record(number: int) -> Record:
        return Record(
            record_id=f"r{number}", group_id=f"g{number}", label_id="same" if number % 4 else "other",
            phenotypes=[Phenotype(id="HP:0001250", label="Seizure")],
        )  # fmt: skip

    records = [record(number) for number in range(64)]
    found = {}
    for balanced in (True, False):
        teacher = build_teacher(
            Fusion(phenotypes=True, class_balanced=balanced, **QUICK | {"num_train_epochs": 30, "learning_rate": 3e-2})
        )
        teacher.fit(LABELS, records)
        row = teacher.score(records[:1])[0]
        found[balanced] = dict(zip(row.labels, np.exp(row.scores), strict=True))["same"]
    assert found[True] == pytest.approx(0.5, abs=0.06)
    assert found[False] == pytest.approx(0.75, abs=0.06)


def test_the_identity_is_that_of_the_encoders(folder: Path) -> None:
    inputs = teacher_inputs(image_config(folder))
    assert list(inputs) == ["image"]
    changed = folder.parent / "changed"
    save_tiny_vit(changed / "vit")
    (changed / "vit" / "preprocessor_config.json").write_text(json.dumps({"size": 16}))
    assert teacher_inputs(image_config(changed)) != inputs
