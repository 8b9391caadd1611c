"""Every record is scored once, also after failures of workers and of the driver, and if the teacher raises."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mint_ray.artifacts import RUNS, Artifact, open_artifact, read_part, verify
from mint_ray.config.loader import UserError, dump
from mint_ray.config.stages import Fit, Score, ScoreResources
from mint_ray.records import Label, Phenotype, Record, TeacherScores
from mint_ray.stages import score as module
from mint_ray.stages.fit import fit_teacher
from mint_ray.stages.score import RecordsPart, ScoredPart, TeacherActor, score_records
from mint_ray.tasks.config import RareDisease
from mint_ray.teachers import Teacher, build_teacher
from mint_ray.teachers.config import Table
from tests.stages.inputs import interrupt_before_publishing

pytestmark = [pytest.mark.ray]

LABELS = ["A", "B", "C"]
SPLITS = ["train", "train", "validation", "test"]
ROWS_PER_PART = 6
RECORDS = 23


def make_record(number: int) -> Record:
    return Record(
        record_id=f"r{number:05d}", group_id=f"g{number}", label_id=LABELS[number % 3], split=SPLITS[number % 4],  # type: ignore[arg-type]
        text="a cough", phenotypes=[Phenotype(id="HP:0000316", label="Hypertelorism")],
    )  # fmt: skip


def score_of(number: int, label: int) -> float:
    """Return scores by which the true label is first, or last for every eighth record."""
    own = -1.0 if number % 8 == 2 else 1.0
    return own if label == number % 3 else label / 100


def write_inputs(
    root: Path | str, count: int = RECORDS, rows_per_part: int = ROWS_PER_PART
) -> tuple[Artifact, Artifact]:
    """Write records in small parts, and a table teacher with scores of all records except the last."""
    records = open_artifact(str(root), "prepare", {"count": count, "rows_per_part": rows_per_part}, {})
    if not records.is_complete:
        with records.write() as draft:
            rows = [make_record(number) for number in range(count)]
            draft.write_rows(Record, "records", rows, rows_per_part=rows_per_part)
            draft.write_rows(Label, "labels", [Label(label_id=label, name=f"name of {label}") for label in LABELS])
    settings = Table(uri="not read")
    teacher = open_artifact(str(root), "fit", {"fit": dump(Fit(teacher=settings))}, {"records": records.name})
    if not teacher.is_complete:
        scores = {
            f"r{number:05d}": {label: score_of(number, index) for index, label in enumerate(LABELS)}
            for number in range(count - 1)
        }
        with teacher.write() as draft:
            draft.write_text("teacher/scores.json", json.dumps({"labels": LABELS, "scores": scores}))
    return records, teacher


def run(root: Path | str, ablate: tuple[str, ...] = (), **resources: Any) -> Artifact:
    records, teacher = write_inputs(root)
    config = Score(ablate=ablate, resources=ScoreResources(**({"batch_size": 4} | resources)))
    return score_records(str(root), config, RareDisease(), teacher, records)


@pytest.fixture(scope="module")
def first(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return run(tmp_path_factory.mktemp("first"), ablate=("face",))


def ids_by_part(artifact: Artifact, table: str) -> list[list[str]]:
    """Return the record ids of each part."""
    files = artifact.table_files(table)
    return [read_part(artifact.file_uri(file.path))["record_id"].to_pylist() for file in files]


def test_every_record_has_one_row_in_the_parallel_part_at_the_same_index(first: Artifact) -> None:
    records, _ = write_inputs(first.root)
    assert ids_by_part(first, "scores") == ids_by_part(records, "records")
    assert [file.rows for file in first.table_files("scores")] == [6, 6, 6, 5]
    assert verify(first.uri) == []


def test_rankings_are_sorted_by_score(first: Artifact) -> None:
    for number, row in enumerate(first.rows(TeacherScores, "scores")[:-1]):
        scores = {label: score_of(number, index) for index, label in enumerate(LABELS)}
        assert row.labels == sorted(LABELS, key=lambda label: -scores[label])
        assert row.scores == sorted(scores.values(), reverse=True)
        assert (row.split, row.status, row.reason) == (SPLITS[number % 4], "ok", None)


def test_a_record_without_a_ranking_keeps_its_row_and_is_counted(first: Artifact) -> None:
    last = first.rows(TeacherScores, "scores")[-1]
    assert (last.record_id, last.status, last.reason, last.labels) == ("r00022", "failed", "no_scores", [])
    assert first.manifest.dropped == {"scores: no_scores": 1, "without_face: no_scores": 1}


def test_a_modality_is_ablated_for_held_out_records_only_in_parallel_parts(first: Artifact) -> None:
    held_out = [f"r{number:05d}" for number in range(RECORDS) if number % 4 >= 2]
    assert [row.record_id for row in first.rows(TeacherScores, "without_face")] == held_out
    assert len(first.table_files("without_face")) == len(first.table_files("scores"))
    assert first.manifest.counts == {"scores": RECORDS, "without_face": len(held_out)}


def test_the_teacher_is_measured_on_the_validation_split(first: Artifact) -> None:
    # validation: 2, 6, 10, 14, 18, 22; the labels of 2, 10 and 18 are ranked last, and 22 has no scores
    expected = {"top_1_accuracy": 0.3333, "top_k_accuracy": 0.8333, "coverage": 0.8333, "records": 6}
    assert first.manifest.metrics["scores"] == expected


def test_pools_and_batches_change_no_byte(first: Artifact, tmp_path: Path) -> None:
    scored = run(tmp_path, ablate=("face",), actors=2, cpus_per_actor=0.5, batch_size=5)
    assert scored.name == first.name
    assert scored.manifest.files == first.manifest.files


def test_no_completion_record_is_left(first: Artifact) -> None:
    assert list((Path(first.root) / RUNS).iterdir()) == []


def test_the_driver_reads_no_rows(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_inputs(tmp_path)
    monkeypatch.setattr(module, "read_part", lambda uri: pytest.fail(f"the driver read {uri}"))
    monkeypatch.setattr(Artifact, "rows", lambda *_: pytest.fail("the driver read rows"))
    assert run(tmp_path).is_complete


class FaultyTeacher:
    """A teacher that raises for some records, and gives invalid scores to others."""

    def __init__(self, teacher: Teacher, faults: dict[str, str]) -> None:
        self.teacher, self.faults = teacher, faults

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        return [self._score(record) for record in records]

    def _score(self, record: Record) -> TeacherScores:
        row, fault = self.teacher.score([record])[0], self.faults.get(record.record_id)
        if fault == "raises":
            raise ValueError(f"cannot read {record.record_id}")
        if fault == "user error":
            raise UserError(f"record {record.record_id!r}: image_uri: not an image")
        if fault in ("nan", "inf", "-inf"):
            return dataclasses.replace(row, scores=[float(fault), *row.scores[1:]])
        if fault == "short":
            return dataclasses.replace(row, scores=row.scores[1:])
        return row


def faulty_actor(faults: dict[str, str], teacher_class: type[FaultyTeacher] = FaultyTeacher) -> type[TeacherActor]:
    class FaultyActor(TeacherActor):
        def _load(self, artifact: Artifact) -> Teacher:
            return teacher_class(super()._load(artifact), faults)  # type: ignore[return-value]

    return FaultyActor


def test_a_record_for_which_the_teacher_raises_fails_and_the_others_do_not(
    first: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    faults = {
        "r00001": "raises", "r00002": "nan", "r00007": "inf", "r00008": "-inf", "r00009": "short", "r00013": "raises",
    }  # fmt: skip
    monkeypatch.setattr(module, "TeacherActor", faulty_actor(faults))
    scored = run(tmp_path)
    rows, expected = scored.rows(TeacherScores, "scores"), first.rows(TeacherScores, "scores")
    assert [row for row in rows if row.record_id not in faults] == [
        row for row in expected if row.record_id not in faults
    ]
    assert {row.record_id: row.reason for row in rows if row.record_id in faults} == {
        "r00001": "teacher_raised_ValueError",
        "r00002": "score_not_finite",
        "r00007": "score_not_finite",
        "r00008": "score_not_finite",
        "r00009": "labels_and_scores_differ_in_length",
        "r00013": "teacher_raised_ValueError",
    }
    assert all(row.status == "failed" and not row.labels and not row.scores for row in rows if row.record_id in faults)
    assert scored.manifest.dropped["scores: teacher_raised_ValueError"] == 2
    expected_warning = "the teacher raised exceptions, the first for record 'r00001': ValueError: cannot read r00001"
    assert expected_warning in caplog.text


def test_a_teacher_that_raises_for_every_record_ends_the_run(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = {f"r{number:05d}": "raises" for number in range(RECORDS)}
    monkeypatch.setattr(module, "TeacherActor", faulty_actor(faults))
    with pytest.raises(Exception, match=r"the teacher raised for each of its \d records: record 'r\d+': ValueError"):
        run(tmp_path)


class BreakingTeacher(FaultyTeacher):
    """A teacher that raises from the sixth record on, like a GPU after an error."""

    calls = 0

    def _score(self, record: Record) -> TeacherScores:
        self.calls += 1
        if self.calls > 5:
            raise RuntimeError("CUDA error")
        return super()._score(record)


def test_a_teacher_that_breaks_ends_the_run_instead_of_failing_all_further_records(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TeacherActor", faulty_actor({}, BreakingTeacher))
    with pytest.raises(Exception, match="CUDA error"):
        run(tmp_path)


def test_a_user_error_of_the_teacher_has_the_same_message_here(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TeacherActor", faulty_actor({"r00003": "user error"}))
    with pytest.raises(UserError, match=r"^record 'r00003': image_uri: not an image$"):
        run(tmp_path)


def test_a_record_that_occurs_twice_is_an_error(ray_cluster: None, tmp_path: Path) -> None:
    _, teacher = write_inputs(tmp_path)
    records = open_artifact(str(tmp_path), "prepare", {"twice": True}, {})
    with records.write() as draft:
        draft.write_rows(Record, "records", [make_record(1), make_record(2), make_record(1)])
    with pytest.raises(UserError, match=r"records/part-00000\.parquet: record_id: 'r00001' occurs more than once$"):
        score_records(str(tmp_path), Score(), RareDisease(), teacher, records)


class DiesOnce(TeacherActor):
    """An actor that logs the parts it works on, and whose process ends once, before the third is written."""

    def work(self, part: RecordsPart, decoded: pa.Table | None = None) -> ScoredPart:
        root = Path(self.artifact.root)
        with (root / "parts.txt").open("a") as stream:
            stream.write(f"{part.path}\n")
        if part.path.endswith("00002.parquet") and not (root / "died").exists():
            (root / "died").touch()
            os._exit(1)
        return super().work(part, decoded)


def logged_parts(root: Path) -> list[str]:
    lines = (root / "parts.txt").read_text().splitlines()
    return sorted(path.removeprefix("scores/part-0000")[0] for path in lines)


def test_a_worker_failure_costs_one_part_and_changes_no_byte(
    first: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TeacherActor", DiesOnce)
    scored = run(tmp_path)
    assert (tmp_path / "died").exists()
    assert logged_parts(tmp_path) == ["0", "1", "2", "2", "3"]
    assert scored.manifest.files == [file for file in first.manifest.files if file.path.startswith("scores/")]
    assert verify(scored.uri) == []


def test_a_run_after_an_interruption_scores_only_the_parts_that_were_in_progress(
    first: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TeacherActor", DiesOnce)
    with interrupt_before_publishing("score"):
        run(tmp_path)
    assert logged_parts(tmp_path) == ["0", "1", "2", "2", "3"]
    name = next((tmp_path / RUNS).iterdir()).name
    # as if the last part was in progress, and the file of another was lost
    (tmp_path / RUNS / name / "scores" / "part-00003.parquet.done.json").unlink()
    (tmp_path / name / "scores" / "part-00001.parquet").unlink()
    (tmp_path / "parts.txt").unlink()
    scored = run(tmp_path)
    assert logged_parts(tmp_path) == ["1", "3"]
    assert scored.manifest.files == [file for file in first.manifest.files if file.path.startswith("scores/")]
    assert scored.manifest.metrics["scores"] == first.manifest.metrics["scores"]
    assert scored.manifest.dropped == {"scores: no_scores": 1}


class RandomTeacher(FaultyTeacher):
    """A teacher whose scores differ from call to call."""

    def _score(self, record: Record) -> TeacherScores:
        row = super()._score(record)
        return dataclasses.replace(row, scores=[score + int.from_bytes(os.urandom(2)) for score in row.scores])


class RandomActor(TeacherActor):
    """An actor with a random teacher, whose process ends once, after it has written a part and before it returns."""

    def _load(self, artifact: Artifact) -> Teacher:
        return RandomTeacher(super()._load(artifact), {})  # type: ignore[return-value]

    def work(self, part: RecordsPart, decoded: pa.Table | None = None) -> ScoredPart:
        result = super().work(part, decoded)
        died = Path(self.artifact.root) / "died"
        if not died.exists():
            died.write_bytes(Path(self.artifact.file_uri(part.path)).read_bytes())
            os._exit(1)
        return result


def test_the_first_of_two_different_attempts_at_a_part_is_kept(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TeacherActor", RandomActor)
    scored = run(tmp_path)
    kept = (tmp_path / "died").read_bytes()
    assert any((tmp_path / scored.name / "scores" / f"part-0000{n}.parquet").read_bytes() == kept for n in range(4))
    assert verify(scored.uri) == []


def test_one_of_two_concurrent_runs_publishes_and_the_other_uses_its_output(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    records, teacher = write_inputs(tmp_path)
    published: list[bytes] = []
    score = module._score

    def run_another_first(*arguments: Any) -> list[ScoredPart]:
        parts = score(*arguments)
        if not published:
            published.append(b"")
            winner = run(tmp_path)
            published[0] = Path(winner.file_uri("manifest.json")).read_bytes()
        return parts

    monkeypatch.setattr(module, "_score", run_another_first)
    caplog.set_level("INFO")
    scored = score_records(str(tmp_path), Score(), RareDisease(), teacher, records)
    assert Path(scored.file_uri("manifest.json")).read_bytes() == published[0]
    assert caplog.text.count("another run has published") == 1
    assert verify(scored.uri) == []


def test_the_ontology_teacher_gives_the_same_scores_part_by_part(ray_cluster: None, tmp_path: Path) -> None:
    labels = [Label(label_id=f"OMIM:{number}", name="x") for number in (163950, 154700, 147920)]
    terms = ["HP:0000316", "HP:0001250", "HP:0004322", "HP:0001166"]
    records = open_artifact(str(tmp_path), "prepare", {}, {})
    rows = [
        dataclasses.replace(make_record(number), phenotypes=[Phenotype(id=terms[number % 4], label="")])
        for number in range(7)
    ]
    with records.write() as draft:
        draft.write_rows(Record, "records", rows, rows_per_part=2)
        draft.write_rows(Label, "labels", labels)
    teacher = fit_teacher(str(tmp_path), Fit(), records)
    scored = score_records(str(tmp_path), Score(), RareDisease(), teacher, records).rows(TeacherScores, "scores")
    loaded = build_teacher(Fit().teacher)
    loaded.load(Path(teacher.file_uri("teacher")))
    assert scored == loaded.score(rows)
    assert all(math.isfinite(score) for row in scored for score in row.scores)


@pytest.mark.s3
def test_workers_write_to_object_storage(s3_root: str, first: Artifact) -> None:
    # in a process of its own, because workers get the credentials that their driver was started with
    command = [sys.executable, "-m", "tests.stages.test_score", s3_root]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    scored = open_artifact(s3_root, "score", first.config, first.inputs)
    assert scored.manifest.files == first.manifest.files
    assert verify(scored.uri) == []
    assert scored.rows(TeacherScores, "scores") == first.rows(TeacherScores, "scores")


if __name__ == "__main__":
    run(sys.argv[1], ablate=("face",))
