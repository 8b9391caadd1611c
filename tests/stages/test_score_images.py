"""A teacher that looks is handed its images decoded, once, in order, whatever some of them are like."""

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
from mint_ray.stages.score import Decoder, RecordsPart, ScoredPart, TeacherActor, score_records
from mint_ray.tasks.config import RareDisease
from mint_ray.teachers.config import Imported

pytestmark = [pytest.mark.ray]

COLOURS = ["red", "green", "blue"]
SPLITS = ["train", "validation", "test"]
RECORDS, ROWS_PER_PART = 23, 6
NO_IMAGE, MISSING, BROKEN = 4, 9, 15


def write_image(path: Path, number: int) -> None:
    """Most of one colour, some of the next."""
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
                record_id=f"r{number:03d}", group_id=f"g{number}", label_id=COLOURS[number % 3],
                split=SPLITS[number // 3 % 3], image_uri=None if number == NO_IMAGE else str(path),  # type: ignore[arg-type]
            )
        )  # fmt: skip
    with records.write() as draft:
        draft.write_rows(Record, "records", rows, rows_per_part=rows_per_part)
        draft.write_rows(Label, "labels", [Label(label_id=colour, name=colour) for colour in COLOURS])
    return records


def write_teacher(root: Path) -> Artifact:
    return fit_teacher(str(root), Fit(teacher=Imported(path="tests.teachers.colours:Colours")), write_records(root))


def run(root: Path, without: tuple[str, ...] = (), **resources: Any) -> Artifact:
    records, teacher = write_records(root), write_teacher(root)
    config = Score(without=without, resources=ScoreResources(**({"batch_size": 4} | resources)))
    return score_records(str(root), config, RareDisease(), teacher, records)


class Blind(TeacherActor):
    """Would read no image itself: its teacher must be handed them."""

    def _load(self, artifact: Artifact) -> Any:
        teacher = super()._load(artifact)
        teacher.score = lambda records: pytest.fail("the teacher read its images itself")  # type: ignore[method-assign]
        return teacher


@pytest.fixture(scope="module")
def first(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TeacherActor", Blind)
        return run(tmp_path_factory.mktemp("first"), without=("face",))


def test_every_record_has_one_row_in_its_place_ranked_by_its_own_image(first: Artifact) -> None:
    rows = first.rows(TeacherScores, "scores")
    assert [row.record_id for row in rows] == [f"r{number:03d}" for number in range(RECORDS)]
    for number, row in enumerate(rows):
        if number in (NO_IMAGE, MISSING, BROKEN):
            continue
        first_colour, second, third = (COLOURS[(number + step) % 3] for step in range(3))
        assert row.labels == [first_colour, second, third]
        assert row.scores == pytest.approx([200, 50 + number, 0])
    assert [file.rows for file in first.table_files("scores")] == [6, 6, 6, 5]
    assert verify(first.uri) == []


def test_an_image_that_cannot_be_read_fails_its_record_alone_with_its_reason(first: Artifact) -> None:
    rows = first.rows(TeacherScores, "scores")
    failed = {row.record_id: row.reason for row in rows if row.status == "failed"}
    assert failed == {"r004": "no_image", "r009": "image_missing", "r015": "image_unknown_format"}
    assert {key: count for key, count in first.manifest.dropped.items() if key.startswith("scores")} == {
        "scores: no_image": 1,
        "scores: image_missing": 1,
        "scores: image_unknown_format": 1,
    }


def test_a_modality_left_out_is_not_seen(first: Artifact) -> None:
    # without the face there is no image
    rows = first.rows(TeacherScores, "without_face")
    assert [row.record_id for row in rows] == [f"r{n:03d}" for n in range(RECORDS) if SPLITS[n // 3 % 3] != "train"]
    assert {row.reason for row in rows} == {"no_image"}


def test_pools_and_batches_change_no_byte(first: Artifact, tmp_path: Path) -> None:
    made = run(tmp_path, actors=2, cpus_per_actor=0.5, decode_cpus=0.25, decode_tasks=2, batch_size=5)
    assert made.manifest.files == [file for file in first.manifest.files if file.path.startswith("scores")]


def test_images_are_decoded_for_a_teacher_that_looks_and_for_no_other(tmp_path: Path) -> None:
    records = write_records(tmp_path)
    looks, told_not_to, reads = (
        fit_teacher(str(tmp_path), Fit(teacher=teacher), records)
        for teacher in (
            Imported(path="tests.teachers.colours:Colours", options={"size": 48}),
            Imported(path="tests.teachers.colours:Colours", options={"size": 0}),
            Imported(path="tests.teachers.longest:LongestName"),
        )
    )
    assert module.frame_of(looks) == Frame(size=48)
    assert module.frame_of(told_not_to) is None
    assert module.frame_of(reads) is None


def work_alone(root: Path, actor: type[TeacherActor], decode: bool, place: str) -> list[TeacherScores]:
    """The first part, decoded and scored in this process."""
    records, teacher = write_records(root), write_teacher(root)
    config = Score(resources=ScoreResources(batch_size=4))
    artifact = open_artifact(str(root), "score", {"place": place}, {})
    file = records.table_files("records")[0]
    part = RecordsPart(table="scores", path="scores/part-00000.parquet", uri=records.file_uri(file.path), without=None)
    frame = module.frame_of(teacher)
    assert frame is not None
    decoded = Decoder(frame, config, RareDisease(), records).work(part) if decode else None
    actor(artifact, config, RareDisease(), teacher, records).work(part, decoded)
    return from_table(TeacherScores, read_part(artifact.file_uri(part.path)))


def test_who_decodes_changes_no_row(tmp_path: Path) -> None:
    handed = work_alone(tmp_path, Blind, True, "handed")
    assert handed == work_alone(tmp_path, TeacherActor, False, "read by the teacher")
    assert [row.status for row in handed] == ["failed" if n == NO_IMAGE else "ok" for n in range(ROWS_PER_PART)]


class Squeamish(TeacherActor):
    """Its teacher raises at the sight of the third image."""

    def _load(self, artifact: Artifact) -> Any:
        teacher: Any = super()._load(artifact)
        look = teacher.teacher.score_seen

        def score_seen(records: Any, images: Any) -> Any:
            if any(isinstance(image, np.ndarray) and image.mean(axis=(0, 1))[0] == 52 for image in images):
                raise ValueError("cannot stand the sight")
            return look(records, images)

        teacher.teacher.score_seen = score_seen
        return teacher


def test_an_image_that_the_teacher_raises_on_fails_its_record_alone(tmp_path: Path) -> None:
    rows, expected = (work_alone(tmp_path, actor, True, actor.__name__) for actor in (Squeamish, TeacherActor))
    assert rows[2].reason == "teacher_raised_ValueError"
    assert rows[:2] + rows[3:] == expected[:2] + expected[3:]


class NotesDecoder(Decoder):
    """Notes which parts it decodes, and kills its worker once, over the third."""

    def work(self, part: RecordsPart) -> pa.Table:
        root = Path(part.uri).parents[2]
        with (root / "decoded.txt").open("a") as stream:
            stream.write(f"{part.path.removeprefix('scores/part-0000')[0]}\n")
        if part.path.endswith("00002.parquet") and not (root / "died").exists():
            (root / "died").touch()
            os._exit(1)
        return super().work(part)


class NotesActor(TeacherActor):
    """Dies once over the second part, and notes which parts it was handed."""

    def work(self, part: RecordsPart, decoded: pa.Table | None = None) -> ScoredPart:
        root = Path(self.artifact.root)
        with (root / "scored.txt").open("a") as stream:
            stream.write(f"{part.path.removeprefix('scores/part-0000')[0]}{'' if decoded else ' blind'}\n")
        if part.path.endswith("00001.parquet") and not (root / "dead").exists():
            (root / "dead").touch()
            os._exit(1)
        return super().work(part, decoded)


def noted(path: Path) -> list[str]:
    return sorted(path.read_text().split("\n"))[1:]


def test_workers_that_die_cost_their_part_and_finished_parts_are_not_decoded_again(
    first: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Decoder", NotesDecoder)
    monkeypatch.setattr(module, "TeacherActor", NotesActor)
    write_teacher(tmp_path)
    with monkeypatch.context() as cut, pytest.raises(KeyboardInterrupt):
        cut.setattr(Artifact, "_publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run(tmp_path)
    assert (tmp_path / "died").exists()
    assert (tmp_path / "dead").exists()
    assert noted(tmp_path / "scored.txt") == ["0", "1", "1", "2", "3"]
    name = next((tmp_path / RUNS).iterdir()).name
    (tmp_path / RUNS / name / "scores" / "part-00003.parquet.done.json").unlink()
    for noting in ("decoded.txt", "scored.txt"):
        (tmp_path / noting).unlink()
    made = run(tmp_path)
    assert noted(tmp_path / "decoded.txt") == ["3"]
    assert noted(tmp_path / "scored.txt") == ["3"]
    expected = [file for file in first.manifest.files if file.path.startswith("scores")]
    assert made.manifest.files == expected
    assert verify(made.uri) == []


def test_a_record_in_two_parts_is_refused(ray_cluster: None, tmp_path: Path) -> None:
    records = write_records(tmp_path)
    twice = open_artifact(str(tmp_path), "prepare", {"twice": True}, {})
    rows = records.rows(Record, "records")
    with twice.write() as draft:
        again = dataclasses.replace(rows[2], label_id="blue")
        draft.write_rows(Record, "records", [*rows[:6], again, *rows[6:9]], rows_per_part=6)
        draft.write_rows(Label, "labels", records.rows(Label, "labels"))
    teacher = fit_teacher(str(tmp_path), Fit(teacher=Imported(path="tests.teachers.colours:Colours")), twice)
    with pytest.raises(UserError, match=r"part-00001\.parquet starts with 'r002', which does not come behind 'r005'"):
        score_records(str(tmp_path), Score(), RareDisease(), teacher, twice)
