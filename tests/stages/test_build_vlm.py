"""A student that sees is joined in a task on a worker, and lies where every machine reads it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mint_ray import storage
from mint_ray.artifacts import Artifact, open_artifact, verify
from mint_ray.config.loader import UserError
from mint_ray.config.stages import Join, Published
from mint_ray.records import Label, Record, Split
from mint_ray.stages.build_vlm import JoinActor, WholePart, check_parts, join_student
from mint_ray.students import Student, check_sight, check_student, load_model, load_sight, student_revision
from tests.encoders import save_tiny_vit
from tests.tiny import save_tiny_student

SHADES = {"liver": 30, "kidney": 220}
SPLITS: tuple[Split, ...] = ("train", "train", "validation", "test")
BROKEN = "r002"


def write_records(root: str) -> Artifact:
    """Images that are all dark or all pale, one of which cannot be read and one that is not there."""
    records = open_artifact(root, "prepare", {}, {})
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
    with records.write() as draft:
        draft.write_rows(Record, "records", rows)
        draft.write_rows(Label, "labels", [Label(label_id=name, name=name) for name in SHADES])
    return records


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Join:
    folder = tmp_path_factory.mktemp("parts")
    return Join(
        vision=Published(model_id=str(save_tiny_vit(folder / "vit"))),
        language=Published(model_id=str(save_tiny_student(folder / "language"))),
        learning_rate=0.02,
        num_train_epochs=20,
        train_batch_size=4,
    )


def test_the_task_trains_on_training_captions_and_counts_what_it_cannot_read(tmp_path: Path, parts: Join) -> None:
    records = write_records(str(tmp_path))
    artifact = open_artifact(str(tmp_path), "join", {}, {})
    made = JoinActor(artifact, parts, records).work(WholePart(path="student"))
    # eight training records, of which one has no image and one a broken one; and 20 passes of 6 by 4
    assert made.counts == {"captions_train": 6, "captions_validation": 4, "steps": 30}
    assert made.dropped == {"image_unknown_format": 1}
    assert made.losses["train_after"] < made.losses["train_before"] - 1
    assert made.losses["validation_after"] < made.losses["validation_before"] - 1
    for file in made.files:
        assert storage.size(artifact.file_uri(file.path)) == file.bytes


def test_without_an_image_to_learn_from_nothing_is_joined(tmp_path: Path, parts: Join) -> None:
    records = open_artifact(str(tmp_path), "prepare", {}, {})
    with records.write() as draft:
        draft.write_rows(
            Record, "records", [Record(record_id="r", group_id="g", label_id="liver", image_uri="none.png")]
        )
        draft.write_rows(Label, "labels", [Label(label_id="liver", name="liver")])
    with pytest.raises(UserError, match=r"no training image can be read \(image_missing 1\)"):
        JoinActor(open_artifact(str(tmp_path), "join", {}, {}), parts, records).work(WholePart(path="student"))


def test_parts_that_are_missing_are_named_before_any_work(tmp_path: Path, parts: Join) -> None:
    check_parts(parts)
    with pytest.raises(UserError, match=r"join\.vision\.model_id: no folder 'no/encoder'"):
        check_parts(Join(vision=Published(model_id="no/encoder"), language=parts.language))
    with pytest.raises(UserError, match=r"join\.language\.model_id: no folder"):
        check_parts(Join(vision=parts.vision, language=Published(model_id=str(tmp_path / "none"))))


@pytest.mark.s3
def test_a_joined_student_in_object_storage_is_read_by_whoever_needs_it(
    tmp_path: Path, parts: Join, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINT_RAY_CACHE", str(tmp_path / "cache"))
    records = write_records(s3_root)
    joined = open_artifact(s3_root, "join", {}, {})
    with joined.write() as draft:
        draft.placed += JoinActor(joined, parts, records).work(WholePart(path="student")).files
    assert verify(joined.uri) == []
    student = Student(model_id=joined.file_uri("student"))
    check_student(student)
    check_sight(student, shows_image=True)
    model, sight = load_model(student), load_sight(student)
    view = sight.look(f"{s3_root}/images/r000.png")
    assert view.tokens == model.config.image_seq_length == 5
    assert student_revision(student) == student_revision(Student(model_id=joined.file_uri("student")))


@pytest.mark.slow
@pytest.mark.ray
def test_the_stage_publishes_once_and_tells_how_far_it_is(
    tmp_path: Path,
    parts: Join,
    ray_cluster: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    records = write_records(str(tmp_path))
    with caplog.at_level("INFO"):
        joined = join_student(str(tmp_path), parts, records)
    counts = joined.manifest.counts
    # the projector's steps, and before and after them all of both splits
    captions = counts["steps"] * parts.train_batch_size + 2 * (counts["captions_train"] + counts["captions_validation"])
    assert f"join: {captions} of {captions} captions" in caplog.text
    assert verify(joined.uri) == []
    assert joined.manifest.metrics["validation_after"] < joined.manifest.metrics["validation_before"]
    assert joined.manifest.counts["captions_train"] == 6
    assert joined.manifest.dropped == {"image_unknown_format": 1}
    assert join_student(str(tmp_path), parts, records).manifest == joined.manifest
