"""Records go through the teacher part by part, once, whoever dies meanwhile and whatever the teacher makes of them."""

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

import pytest

from mint_ray.artifacts import RUNS, Artifact, open_artifact, read_part, verify
from mint_ray.config.loader import UserError, dump, from_data
from mint_ray.config.stages import Fit, Prepare, Score, ScoreResources
from mint_ray.records import Label, Phenotype, Record, TeacherScores, from_table
from mint_ray.stages import score as module
from mint_ray.stages.fit import fit_teacher
from mint_ray.stages.score import RecordsPart, ScoredPart, TeacherActor, score_records
from mint_ray.tasks.config import RareDisease
from mint_ray.teachers import Teacher
from mint_ray.teachers.config import Table

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
    """The true label is first, except that of every eighth record, which is last."""
    right = -1.0 if number % 8 == 2 else 1.0
    return right if label == number % 3 else label / 100


def write_inputs(
    root: Path | str, count: int = RECORDS, rows_per_part: int = ROWS_PER_PART
) -> tuple[Artifact, Artifact]:
    """Records in small parts, and a table teacher that knows them all but the last."""
    records = open_artifact(str(root), "prepare", {"count": count, "rows_per_part": rows_per_part}, {})
    if not records.is_complete:
        with records.write() as draft:
            rows = [make_record(number) for number in range(count)]
            draft.write_rows(Record, "records", rows, rows_per_part=rows_per_part)
            draft.write_rows(Label, "labels", [Label(label_id=label, name=f"name of {label}") for label in LABELS])
    settings = Table(uri="made of nothing")
    teacher = open_artifact(str(root), "fit", {"fit": dump(Fit(teacher=settings))}, {"records": records.name})
    if not teacher.is_complete:
        scores = {
            f"r{number:05d}": {label: score_of(number, index) for index, label in enumerate(LABELS)}
            for number in range(count - 1)
        }
        with teacher.write() as draft:
            draft.write_text("teacher/scores.json", json.dumps({"labels": LABELS, "scores": scores}))
    return records, teacher


def run(root: Path | str, without: tuple[str, ...] = (), **resources: Any) -> Artifact:
    records, teacher = write_inputs(root)
    config = Score(without=without, resources=ScoreResources(**({"batch_size": 4} | resources)))
    return score_records(str(root), config, RareDisease(), teacher, records)


@pytest.fixture(scope="module")
def first(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return run(tmp_path_factory.mktemp("first"), without=("face",))


def parts(artifact: Artifact, table: str) -> list[list[str]]:
    """The record ids of each part."""
    files = artifact.table_files(table)
    return [read_part(artifact.file_uri(file.path))["record_id"].to_pylist() for file in files]


def test_every_record_has_one_row_in_the_part_and_place_it_came_from(first: Artifact) -> None:
    records, _ = write_inputs(first.root)
    assert parts(first, "scores") == parts(records, "records")
    assert [file.rows for file in first.table_files("scores")] == [6, 6, 6, 5]
    assert verify(first.uri) == []


def test_rankings_are_those_of_a_plain_sort(first: Artifact) -> None:
    for number, row in enumerate(first.rows(TeacherScores, "scores")[:-1]):
        scores = {label: score_of(number, index) for index, label in enumerate(LABELS)}
        assert row.labels == sorted(LABELS, key=lambda label: -scores[label])
        assert row.scores == sorted(scores.values(), reverse=True)
        assert (row.split, row.status, row.reason) == (SPLITS[number % 4], "ok", None)


def test_a_record_without_a_ranking_keeps_its_row_and_is_counted(first: Artifact) -> None:
    last = first.rows(TeacherScores, "scores")[-1]
    assert (last.record_id, last.status, last.reason, last.labels) == ("r00022", "failed", "no_scores", [])
    assert first.manifest.dropped == {"scores: no_scores": 1, "without_face: no_scores": 1}


def test_a_modality_is_left_out_for_held_out_records_alone_in_parallel_parts(first: Artifact) -> None:
    held_out = [f"r{number:05d}" for number in range(RECORDS) if number % 4 >= 2]
    assert [row.record_id for row in first.rows(TeacherScores, "without_face")] == held_out
    assert len(first.table_files("without_face")) == len(first.table_files("scores"))
    assert first.manifest.counts == {"scores": RECORDS, "without_face": len(held_out)}


def test_the_teacher_is_judged_on_the_validation_split(first: Artifact) -> None:
    # validation: 2, 6, 10, 14, 18, 22; of these 2, 10 and 18 are ranked last, and 22 cannot be ranked
    expected = {"top_1_accuracy": 0.3333, "top_10_accuracy": 0.8333, "coverage": 0.8333, "records": 6}
    assert first.manifest.metrics["scores"] == expected


def test_pools_and_batches_change_no_byte(first: Artifact, tmp_path: Path) -> None:
    made = run(tmp_path, without=("face",), actors=2, cpus_per_actor=0.5, batch_size=5)
    assert made.name == first.name
    assert made.manifest.files == first.manifest.files


def test_nothing_is_left_of_the_run(first: Artifact) -> None:
    assert list((Path(first.root) / RUNS).iterdir()) == []


def test_the_driver_reads_no_rows(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_inputs(tmp_path)
    monkeypatch.setattr(module, "read_part", lambda uri: pytest.fail(f"the driver read {uri}"))
    monkeypatch.setattr(Artifact, "rows", lambda *_: pytest.fail("the driver read rows"))
    assert run(tmp_path).is_complete


class Grumpy:
    """Wraps a teacher: raises on some records, and says no number of others."""

    def __init__(self, teacher: Teacher, trouble: dict[str, str]) -> None:
        self.teacher, self.trouble = teacher, trouble

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        return [self._score(record) for record in records]

    def _score(self, record: Record) -> TeacherScores:
        row, trouble = self.teacher.score([record])[0], self.trouble.get(record.record_id)
        if trouble == "raises":
            raise ValueError(f"cannot read {record.record_id}")
        if trouble == "user error":
            raise UserError(f"record {record.record_id!r}: image_uri: not an image")
        if trouble in ("nan", "inf", "-inf"):
            return dataclasses.replace(row, scores=[float(trouble), *row.scores[1:]])
        if trouble == "short":
            return dataclasses.replace(row, scores=row.scores[1:])
        return row


def grumpy(trouble: dict[str, str]) -> type[TeacherActor]:
    class GrumpyActor(TeacherActor):
        def _load(self, artifact: Artifact) -> Teacher:
            return Grumpy(super()._load(artifact), trouble)  # type: ignore[return-value]

    return GrumpyActor


def test_a_record_the_teacher_fails_on_fails_alone(
    first: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trouble = {
        "r00001": "raises", "r00002": "nan", "r00007": "inf", "r00008": "-inf", "r00009": "short", "r00013": "raises",
    }  # fmt: skip
    monkeypatch.setattr(module, "TeacherActor", grumpy(trouble))
    made = run(tmp_path)
    rows, expected = made.rows(TeacherScores, "scores"), first.rows(TeacherScores, "scores")
    assert [row for row in rows if row.record_id not in trouble] == [
        row for row in expected if row.record_id not in trouble
    ]
    assert {row.record_id: row.reason for row in rows if row.record_id in trouble} == {
        "r00001": "teacher_raised_ValueError",
        "r00002": "score_not_finite",
        "r00007": "score_not_finite",
        "r00008": "score_not_finite",
        "r00009": "labels_and_scores_differ_in_length",
        "r00013": "teacher_raised_ValueError",
    }
    assert all(row.status == "failed" and not row.labels and not row.scores for row in rows if row.record_id in trouble)
    assert made.manifest.dropped["scores: teacher_raised_ValueError"] == 2
    assert "the teacher failed, first on record 'r00001': ValueError: cannot read r00001" in caplog.text


def test_a_teacher_that_fails_on_every_record_ends_the_run(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TeacherActor", grumpy({f"r{number:05d}": "raises" for number in range(RECORDS)}))
    with pytest.raises(Exception, match=r"the teacher failed on every one of \d records: record 'r\d+': ValueError"):
        run(tmp_path)


class Breaks(Grumpy):
    """Scores five records and then nothing any more, like a GPU after an error."""

    calls = 0

    def _score(self, record: Record) -> TeacherScores:
        self.calls += 1
        if self.calls > 5:
            raise RuntimeError("CUDA error")
        return super()._score(record)


def test_a_teacher_that_breaks_ends_the_run_instead_of_failing_what_follows(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class BreakingActor(TeacherActor):
        def _load(self, artifact: Artifact) -> Teacher:
            return Breaks(super()._load(artifact), {})  # type: ignore[return-value]

    monkeypatch.setattr(module, "TeacherActor", BreakingActor)
    with pytest.raises(Exception, match="CUDA error"):
        run(tmp_path)


def test_what_the_user_can_mend_is_one_line(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TeacherActor", grumpy({"r00003": "user error"}))
    with pytest.raises(UserError, match=r"^record 'r00003': image_uri: not an image$"):
        run(tmp_path)


def test_a_record_that_occurs_twice_is_refused(ray_cluster: None, tmp_path: Path) -> None:
    _, teacher = write_inputs(tmp_path)
    records = open_artifact(str(tmp_path), "prepare", {"twice": True}, {})
    with records.write() as draft:
        draft.write_rows(Record, "records", [make_record(1), make_record(2), make_record(1)])
    with pytest.raises(UserError, match=r"records/part-00000\.parquet: record_id: 'r00001' occurs more than once$"):
        score_records(str(tmp_path), Score(), RareDisease(), teacher, records)


class Notes(TeacherActor):
    """Notes which parts it works on, and kills its worker once, before the third is written."""

    def work(self, part: RecordsPart) -> ScoredPart:
        place = Path(self.artifact.root)
        with (place / "worked.txt").open("a") as stream:
            stream.write(f"{part.path}\n")
        if part.path.endswith("00002.parquet") and not (place / "died").exists():
            (place / "died").touch()
            os._exit(1)
        return super().work(part)


def worked(root: Path) -> list[str]:
    return sorted(path.removeprefix("scores/part-0000")[0] for path in (root / "worked.txt").read_text().splitlines())


def test_a_worker_that_dies_costs_its_part_and_changes_no_byte(
    first: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TeacherActor", Notes)
    made = run(tmp_path)
    assert (tmp_path / "died").exists()
    assert worked(tmp_path) == ["0", "1", "2", "2", "3"]
    assert made.manifest.files == [file for file in first.manifest.files if file.path.startswith("scores/")]
    assert verify(made.uri) == []


def test_a_run_after_one_that_was_cut_off_does_only_what_was_in_flight(
    first: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_inputs(tmp_path)
    monkeypatch.setattr(module, "TeacherActor", Notes)
    with monkeypatch.context() as cut, pytest.raises(KeyboardInterrupt):
        cut.setattr(Artifact, "_publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run(tmp_path)
    assert worked(tmp_path) == ["0", "1", "2", "2", "3"]
    name = next((tmp_path / RUNS).iterdir()).name
    # as if the last had been in flight, and the part of another had been lost
    (tmp_path / RUNS / name / "scores" / "part-00003.parquet.done.json").unlink()
    (tmp_path / name / "scores" / "part-00001.parquet").unlink()
    (tmp_path / "worked.txt").unlink()
    made = run(tmp_path)
    assert worked(tmp_path) == ["1", "3"]
    assert made.manifest.files == [file for file in first.manifest.files if file.path.startswith("scores/")]
    assert made.manifest.metrics["scores"] == first.manifest.metrics["scores"]
    assert made.manifest.dropped == {"scores: no_scores": 1}


class Dithers(Grumpy):
    """Says other numbers each time."""

    def _score(self, record: Record) -> TeacherScores:
        row = super()._score(record)
        return dataclasses.replace(row, scores=[score + int.from_bytes(os.urandom(2)) for score in row.scores])


class DithersAndDies(TeacherActor):
    """Its worker is killed once, when the first part is written and nobody has been told."""

    def _load(self, artifact: Artifact) -> Teacher:
        return Dithers(super()._load(artifact), {})  # type: ignore[return-value]

    def work(self, part: RecordsPart) -> ScoredPart:
        made = super().work(part)
        died = Path(self.artifact.root) / "died"
        if not died.exists():
            died.write_bytes(Path(self.artifact.file_uri(part.path)).read_bytes())
            os._exit(1)
        return made


def test_of_two_attempts_that_come_out_otherwise_the_first_is_kept(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TeacherActor", DithersAndDies)
    made = run(tmp_path)
    kept = (tmp_path / "died").read_bytes()
    assert any((tmp_path / made.name / "scores" / f"part-0000{n}.parquet").read_bytes() == kept for n in range(4))
    assert verify(made.uri) == []


def test_of_two_runs_at_once_one_publishes_and_the_other_goes_on_with_that(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    records, teacher = write_inputs(tmp_path)
    published: list[bytes] = []
    score = module._score

    def overtaken(*arguments: Any) -> list[ScoredPart]:
        made = score(*arguments)
        if not published:
            published.append(b"")
            winner = run(tmp_path)
            published[0] = Path(winner.file_uri("manifest.json")).read_bytes()
        return made

    monkeypatch.setattr(module, "_score", overtaken)
    caplog.set_level("INFO")
    made = score_records(str(tmp_path), Score(), RareDisease(), teacher, records)
    assert Path(made.file_uri("manifest.json")).read_bytes() == published[0]
    assert caplog.text.count("another run has published") == 1
    assert verify(made.uri) == []


@pytest.mark.parametrize("rows_per_part", [0, -1])
def test_parts_have_at_least_one_row(rows_per_part: int) -> None:
    with pytest.raises(UserError, match=f"rows_per_part must be positive, got {rows_per_part}"):
        from_data(Prepare, {"source": {"kind": "hpo"}, "rows_per_part": rows_per_part})


def test_the_ontology_teacher_scores_parts_as_it_scores_the_whole(ray_cluster: None, tmp_path: Path) -> None:
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
    made = score_records(str(tmp_path), Score(), RareDisease(), teacher, records)
    whole = module.build_teacher(Fit().teacher)
    whole.load(Path(teacher.file_uri("teacher")))
    assert made.rows(TeacherScores, "scores") == whole.score(rows)
    assert all(math.isfinite(score) for row in made.rows(TeacherScores, "scores") for score in row.scores)


@pytest.mark.s3
def test_workers_write_to_object_storage(s3_root: str, first: Artifact) -> None:
    # in a process of its own: workers get the credentials that their driver started with
    command = [sys.executable, "-m", "tests.stages.test_score", s3_root]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    made = open_artifact(s3_root, "score", first.config, first.inputs)
    assert made.manifest.files == first.manifest.files
    assert verify(made.uri) == []
    assert [from_table(TeacherScores, read_part(made.file_uri(file.path))) for file in made.table_files("scores")]


if __name__ == "__main__":
    run(sys.argv[1], without=("face",))
