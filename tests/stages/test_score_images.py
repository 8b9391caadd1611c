"""A teacher that takes images gets them decoded, each once and in order; an unreadable one fails its record only."""

from __future__ import annotations

import dataclasses
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from mint_ray.artifacts import RUNS, Artifact, open_artifact, read_part, verify
from mint_ray.config.loader import UserError
from mint_ray.config.stages import Fit, Score, ScoreResources
from mint_ray.images import Frame
from mint_ray.records import Label, Record, TeacherScores, from_table
from mint_ray.stages import score as module
from mint_ray.stages.fit import fit_teacher
from mint_ray.stages.score import ImageDecoder, RecordsPart, ScoredPart, TeacherActor, score_records
from mint_ray.tasks.config import RareDisease
from mint_ray.teachers.config import Imported
from tests.stages.inputs import interrupt_before_publishing

pytestmark = [pytest.mark.ray]

COLORS = ["red", "green", "blue"]
SPLITS = ["train", "validation", "test"]
RECORDS, ROWS_PER_PART = 23, 6
NO_IMAGE, MISSING, BROKEN = 4, 9, 15


def write_image(path: Path, number: int) -> None:
    """Write an image with most of one color and some of the next."""
    pixels = np.zeros((12, 10, 3), np.uint8)
    pixels[..., number % 3] = 200
    pixels[..., (number + 1) % 3] = 50 + number
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    path.write_bytes(target.getvalue() if number != BROKEN else b"not an image")


def write_records(root: Path, rows_per_part: int = ROWS_PER_PART) -> Artifact:
    records = open_artifact(str(root), "prepare", {"rows_per_part": rows_per_part}, {})
    if records.is_complete:
        return records
    (root / "images").mkdir(exist_ok=True)
    rows = []
    for number in range(RECORDS):
        path = root / "images" / f"{number}.png"
        if number != MISSING:
            write_image(path, number)
        rows.append(
            Record(
                record_id=f"r{number:03d}", group_id=f"g{number}", label_id=COLORS[number % 3],
                split=SPLITS[number // 3 % 3], image_uri=None if number == NO_IMAGE else str(path),  # type: ignore[arg-type]
            )
        )  # fmt: skip
    with records.write() as draft:
        draft.write_rows(Record, "records", rows, rows_per_part=rows_per_part)
        draft.write_rows(Label, "labels", [Label(label_id=color, name=color) for color in COLORS])
    return records


TEACHER = Fit(teacher=Imported(path="tests.teachers.color_teacher:ColorTeacher"))


def write_teacher(root: Path) -> Artifact:
    return fit_teacher(str(root), TEACHER, write_records(root))


def run(root: Path, ablate: tuple[str, ...] = (), **resources: Any) -> Artifact:
    records, teacher = write_records(root), write_teacher(root)
    config = Score(ablate=ablate, resources=ScoreResources(**({"batch_size": 4} | resources)))
    return score_records(str(root), config, RareDisease(), teacher, records)


class DecodedOnlyActor(TeacherActor):
    """An actor whose teacher must not read images itself."""

    def _load(self, artifact: Artifact) -> Any:
        teacher = super()._load(artifact)
        teacher.score = lambda records: pytest.fail("the teacher read its images itself")  # type: ignore[method-assign]
        return teacher


@pytest.fixture(scope="module")
def first(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TeacherActor", DecodedOnlyActor)
        return run(tmp_path_factory.mktemp("first"), ablate=("face",))


def test_every_record_has_one_row_at_its_index_ranked_by_its_own_image(first: Artifact) -> None:
    rows = first.rows(TeacherScores, "scores")
    assert [row.record_id for row in rows] == [f"r{number:03d}" for number in range(RECORDS)]
    for number, row in enumerate(rows):
        if number in (NO_IMAGE, MISSING, BROKEN):
            continue
        first_color, second, third = (COLORS[(number + step) % 3] for step in range(3))
        assert row.labels == [first_color, second, third]
        assert row.scores == pytest.approx([200, 50 + number, 0])
    assert [file.rows for file in first.table_files("scores")] == [6, 6, 6, 5]
    assert verify(first.uri) == []


def test_an_unreadable_image_fails_its_record_only_with_its_reason(first: Artifact) -> None:
    rows = first.rows(TeacherScores, "scores")
    failed = {row.record_id: row.reason for row in rows if row.status == "failed"}
    assert failed == {"r004": "no_image", "r009": "image_missing", "r015": "image_unknown_format"}
    assert {key: count for key, count in first.manifest.dropped.items() if key.startswith("scores")} == {
        "scores: no_image": 1,
        "scores: image_missing": 1,
        "scores: image_unknown_format": 1,
    }


def test_an_ablated_image_is_not_decoded(first: Artifact) -> None:
    # the face is the image
    rows = first.rows(TeacherScores, "without_face")
    assert [row.record_id for row in rows] == [f"r{n:03d}" for n in range(RECORDS) if SPLITS[n // 3 % 3] != "train"]
    assert {row.reason for row in rows} == {"no_image"}


def test_pools_and_batches_change_no_byte(first: Artifact, tmp_path: Path) -> None:
    scored = run(tmp_path, actors=2, cpus_per_actor=0.5, decode_cpus=0.25, decode_tasks=2, batch_size=5)
    assert scored.manifest.files == [file for file in first.manifest.files if file.path.startswith("scores")]


def test_images_are_decoded_for_a_teacher_that_takes_images_and_for_no_other(tmp_path: Path) -> None:
    records = write_records(tmp_path)
    images, images_off, no_images = (
        fit_teacher(str(tmp_path), Fit(teacher=teacher), records)
        for teacher in (
            Imported(path="tests.teachers.color_teacher:ColorTeacher", options={"size": 48}),
            Imported(path="tests.teachers.color_teacher:ColorTeacher", options={"size": 0}),
            Imported(path="tests.teachers.longest_name:LongestNameTeacher"),
        )
    )
    assert module.frame_of(images) == Frame(size=48)
    assert module.frame_of(images_off) is None
    assert module.frame_of(no_images) is None


def score_first_part(root: Path, actor: type[TeacherActor], decode: bool, name: str) -> list[TeacherScores]:
    """Decode and score the first part in this process."""
    records, teacher = write_records(root), write_teacher(root)
    config = Score(resources=ScoreResources(batch_size=4))
    artifact = open_artifact(str(root), "score", {"name": name}, {})
    file = records.table_files("records")[0]
    part = RecordsPart(table="scores", path="scores/part-00000.parquet", uri=records.file_uri(file.path))
    frame = module.frame_of(teacher)
    assert frame is not None
    decoded = ImageDecoder(frame, config, RareDisease(), records).work(part) if decode else None
    actor(artifact, config, RareDisease(), teacher, records).work(part, decoded)
    return from_table(TeacherScores, read_part(artifact.file_uri(part.path)))


def test_scores_are_the_same_if_the_teacher_reads_its_images(tmp_path: Path) -> None:
    rows = score_first_part(tmp_path, DecodedOnlyActor, True, "decoded ahead")
    assert rows == score_first_part(tmp_path, TeacherActor, False, "read by the teacher")
    assert [row.status for row in rows] == ["failed" if n == NO_IMAGE else "ok" for n in range(ROWS_PER_PART)]


class FaultyActor(TeacherActor):
    """An actor whose teacher raises for the third image."""

    def _load(self, artifact: Artifact) -> Any:
        teacher: Any = super()._load(artifact)
        original = teacher.teacher.score_images

        def score_images(records: Any, images: Any) -> Any:
            if any(isinstance(image, np.ndarray) and image.mean(axis=(0, 1))[0] == 52 for image in images):
                raise ValueError("cannot score this image")
            return original(records, images)

        teacher.teacher.score_images = score_images
        return teacher


def test_an_image_for_which_the_teacher_raises_fails_its_record_only(tmp_path: Path) -> None:
    rows, expected = (score_first_part(tmp_path, actor, True, actor.__name__) for actor in (FaultyActor, TeacherActor))
    assert rows[2].reason == "teacher_raised_ValueError"
    assert rows[:2] + rows[3:] == expected[:2] + expected[3:]


class DecoderThatDiesOnce(ImageDecoder):
    """A decoder that logs the parts it decodes, and whose process ends once, at the third."""

    def work(self, part: RecordsPart) -> pa.Table:
        root = Path(part.uri).parents[2]
        with (root / "decoded.txt").open("a") as stream:
            stream.write(f"{part.path.removeprefix('scores/part-0000')[0]}\n")
        if part.path.endswith("00002.parquet") and not (root / "decoder-died").exists():
            (root / "decoder-died").touch()
            os._exit(1)
        return super().work(part)


class ActorThatDiesOnce(TeacherActor):
    """An actor that logs the parts it scores, and whose process ends once, at the second."""

    def work(self, part: RecordsPart, decoded: pa.Table | None = None) -> ScoredPart:
        root = Path(self.artifact.root)
        with (root / "scored.txt").open("a") as stream:
            stream.write(f"{part.path.removeprefix('scores/part-0000')[0]}{'' if decoded else ' without images'}\n")
        if part.path.endswith("00001.parquet") and not (root / "actor-died").exists():
            (root / "actor-died").touch()
            os._exit(1)
        return super().work(part, decoded)


def logged(path: Path) -> list[str]:
    return sorted(path.read_text().splitlines())


def test_a_worker_failure_costs_one_part_and_finished_parts_are_not_decoded_again(
    first: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ImageDecoder", DecoderThatDiesOnce)
    monkeypatch.setattr(module, "TeacherActor", ActorThatDiesOnce)
    with interrupt_before_publishing("score"):
        run(tmp_path)
    assert (tmp_path / "decoder-died").exists()
    assert (tmp_path / "actor-died").exists()
    assert logged(tmp_path / "scored.txt") == ["0", "1", "1", "2", "3"]
    name = next((tmp_path / RUNS).iterdir()).name
    (tmp_path / RUNS / name / "scores" / "part-00003.parquet.done.json").unlink()
    for log in ("decoded.txt", "scored.txt"):
        (tmp_path / log).unlink()
    scored = run(tmp_path)
    assert logged(tmp_path / "decoded.txt") == ["3"]
    assert logged(tmp_path / "scored.txt") == ["3"]
    expected = [file for file in first.manifest.files if file.path.startswith("scores")]
    assert scored.manifest.files == expected
    assert verify(scored.uri) == []


def test_a_record_in_two_parts_is_an_error(ray_cluster: None, tmp_path: Path) -> None:
    records = write_records(tmp_path)
    twice = open_artifact(str(tmp_path), "prepare", {"twice": True}, {})
    rows = records.rows(Record, "records")
    with twice.write() as draft:
        again = dataclasses.replace(rows[2], label_id="blue")
        draft.write_rows(Record, "records", [*rows[:6], again, *rows[6:9]], rows_per_part=6)
        draft.write_rows(Label, "labels", records.rows(Label, "labels"))
    teacher = fit_teacher(str(tmp_path), TEACHER, twice)
    with pytest.raises(
        UserError, match=r"part-00001\.parquet has 'r002', and the part before it has 'r005'; records must be"
    ):
        score_records(str(tmp_path), Score(), RareDisease(), teacher, twice)
