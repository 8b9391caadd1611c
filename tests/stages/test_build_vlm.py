"""A vision-language student is built on a worker and written to where every machine can read it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mint_ray import storage
from mint_ray.artifacts import Artifact, open_artifact, verify
from mint_ray.config.loader import UserError
from mint_ray.config.stages import BuildVlm, Pretrained
from mint_ray.models.pretrained import check_model, model_identity
from mint_ray.records import Label, Record, Split
from mint_ray.runtime.map_parts import Part
from mint_ray.stages.build_vlm import BuildVlmTask, build_vlm, check_models
from mint_ray.students.checks import check_images
from mint_ray.students.config import Student
from mint_ray.students.loading import load_model, load_vision_processor
from tests.encoders import save_tiny_vit
from tests.stages.inputs import write_records
from tests.tiny import save_tiny_student

SHADES = {"liver": 30, "kidney": 220}
LABELS = [Label(label_id=name, name=name) for name in SHADES]
SPLITS: tuple[Split, ...] = ("train", "train", "validation", "test")
BROKEN = "r002"
PART = Part(path="student")


def write_images(root: str) -> Artifact:
    """Write records with dark or bright images, one of which cannot be read and one of which is missing."""
    rows = []
    for number in range(16):
        record_id, label_id = f"r{number:03d}", list(SHADES)[number % 2]
        target = io.BytesIO()
        Image.fromarray(np.full((40, 40, 3), SHADES[label_id] + number, np.uint8)).save(target, "PNG")
        uri = f"{root}/images/{record_id}.png"
        storage.write_bytes(uri, b"no image" if record_id == BROKEN else target.getvalue())
        rows.append(
            Record(
                record_id=record_id, group_id=record_id, label_id=label_id, split=SPLITS[number // 2 % 4],
                image_uri=None if number == 3 else uri,
            )
        )  # fmt: skip
    return write_records(root, rows, LABELS)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> BuildVlm:
    folder = tmp_path_factory.mktemp("models")
    return BuildVlm(
        vision=Pretrained(model_id=str(save_tiny_vit(folder / "vit"))),
        language=Pretrained(model_id=str(save_tiny_student(folder / "language"))),
        learning_rate=0.02,
        num_train_epochs=20,
        train_batch_size=4,
    )


def test_the_projector_learns_the_training_captions_and_unreadable_images_are_counted(
    tmp_path: Path, config: BuildVlm
) -> None:
    records = write_images(str(tmp_path))
    artifact = open_artifact(str(tmp_path), "build_vlm", {}, {})
    built = BuildVlmTask(artifact, config, records).work(PART)
    # of eight training records one has no image and one a broken one; 20 epochs of 6 images in batches of 4
    assert built.counts == {"captions_train": 6, "captions_validation": 4, "steps": 30}
    assert built.dropped == {"image_unknown_format": 1}
    assert built.losses["train_after"] < built.losses["train_before"] - 1
    assert built.losses["validation_after"] < built.losses["validation_before"] - 1
    for file in built.files:
        assert storage.size(artifact.file_uri(file.path)) == file.bytes


def test_no_readable_training_image_is_an_error(tmp_path: Path, config: BuildVlm) -> None:
    record = Record(record_id="r", group_id="g", label_id="liver", image_uri="none.png")
    records = write_records(tmp_path, [record], LABELS)
    artifact = open_artifact(str(tmp_path), "build_vlm", {}, {})
    with pytest.raises(UserError, match=r"^build_vlm: no training image can be read \(image_missing 1\)$"):
        BuildVlmTask(artifact, config, records).work(PART)


def test_missing_models_are_named_before_any_work(tmp_path: Path, config: BuildVlm) -> None:
    check_models(config)
    with pytest.raises(UserError, match=r"^build_vlm\.vision\.model_id: no folder 'no/encoder'"):
        check_models(BuildVlm(vision=Pretrained(model_id="no/encoder"), language=config.language))
    with pytest.raises(UserError, match=r"^build_vlm\.language\.model_id: no folder"):
        check_models(BuildVlm(vision=config.vision, language=Pretrained(model_id=str(tmp_path / "none"))))


@pytest.mark.s3
def test_a_student_in_object_storage_loads_like_any_other(
    tmp_path: Path, config: BuildVlm, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINT_RAY_CACHE", str(tmp_path / "cache"))
    records = write_images(s3_root)
    built = open_artifact(s3_root, "build_vlm", {}, {})
    with built.write() as draft:
        draft.add_part(BuildVlmTask(built, config, records).work(PART))
    assert verify(built.uri) == []
    student = Student(model_id=built.file_uri("student"))
    check_model(student)
    check_images(student, show_image=True)
    model, vision_processor = load_model(student), load_vision_processor(student)
    assert vision_processor is not None
    processed = vision_processor.read(f"{s3_root}/images/r000.png")
    assert processed.num_tokens == model.config.image_seq_length == 5
    assert model_identity(student, "student") == model_identity(Student(model_id=built.file_uri("student")), "student")


@pytest.mark.slow
@pytest.mark.ray
def test_the_stage_reports_progress_and_runs_once(
    ray_cluster: None, tmp_path: Path, config: BuildVlm, caplog: pytest.LogCaptureFixture
) -> None:
    records = write_images(str(tmp_path))
    with caplog.at_level("INFO"):
        built = build_vlm(str(tmp_path), config, records)
    counts = built.manifest.counts
    # the captions of the projector's steps, and those of both splits before and after them
    captions = counts["steps"] * config.train_batch_size
    captions += 2 * (counts["captions_train"] + counts["captions_validation"])
    assert f"build_vlm: {captions} of {captions} captions" in caplog.text
    assert verify(built.uri) == []
    assert built.manifest.metrics["validation_after"] < built.manifest.metrics["validation_before"]
    assert built.manifest.counts["captions_train"] == 6
    assert built.manifest.dropped == {"image_unknown_format": 1}
    assert build_vlm(str(tmp_path), config, records).manifest == built.manifest
