"""Ask the teacher to rank every label of every record, part by part, from storage to storage, each part once."""

from __future__ import annotations

import dataclasses
import logging
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mint_ray import storage
from mint_ray.artifacts import Artifact, File, open_artifact, read_part
from mint_ray.loading import UserError, dump, from_data
from mint_ray.records import Label, Record, TeacherScores, from_table
from mint_ray.stages.config import Fit, Score
from mint_ray.stages.session import map_parts
from mint_ray.tasks import Task, build_task
from mint_ray.tasks.config import AnyTask
from mint_ray.teachers import Teacher, build_teacher
from mint_ray.teachers.config import AnyTeacher
from mint_ray.telemetry import Progress

logger = logging.getLogger("mint_ray")

RAISED = "teacher_raised"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RecordsPart:
    """One part of the records, to be scored whole or without one modality: the work of one task."""

    table: str
    path: str
    """Of the part that is written."""
    uri: str
    """Of the part that is read."""
    without: str | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScoredPart:
    """What a task made of one part of the records: all that the driver ever sees of them."""

    table: str
    path: str
    read: int
    """Rows of the part that was read."""
    files: list[File]
    judged: dict[str, int]
    """Of the validation split: `records`, and how many of them have their label in the `top_1`, the `top_10`, are
    `ok`."""
    failed: dict[str, int]
    """Records without a ranking, by reason, and answers that an ensemble had to do without, by member."""
    complaint: str | None
    """What the teacher said of the first record that it raised on."""


def score_records(root: str, config: Score, task: AnyTask, teacher: Artifact, records: Artifact) -> Artifact:
    """Table `scores`, one row per record, and a table `without_x` of held-out records for each modality left out.

    The parts of each table are parallel to those of the records: same index, same order of rows. A record that the
    teacher cannot score keeps its row, with status `failed` and a reason. Raises UserError for a record that occurs
    twice in a part; what a teacher raises on every record of a part ends the run.
    """
    inputs = {"records": records.name, "teacher": teacher.name}
    artifact = open_artifact(root, "score", {"score": dump(config), "task": dump(task)}, inputs)
    if artifact.is_complete:
        return artifact
    with artifact.write() as draft:
        made = _score(artifact, config, task, teacher, records)
        for table in dict.fromkeys(part.table for part in made):
            parts = [part for part in made if part.table == table]
            draft.placed += [file for part in parts for file in part.files]
            draft.counts[table] = sum(file.rows or 0 for part in parts for file in part.files)
            for part in parts:
                draft.dropped.update({f"{table}: {reason}": count for reason, count in part.failed.items()})
            draft.metrics[table] = _shares([part.judged for part in parts])
        complaints = [part.complaint for part in made if part.complaint]
        if complaints:
            logger.warning("score: the teacher failed, first on %s", complaints[0])
    logger.info("score: on validation %s", draft.metrics["scores"])
    return artifact


class TeacherActor:
    """Holds one teacher on a worker and ranks the labels of the records of one part after the other."""

    def __init__(self, artifact: Artifact, config: Score, task: AnyTask, teacher: Artifact, records: Artifact) -> None:
        self.artifact, self.batch_size = artifact, config.resources.batch_size
        self.name = _settings(teacher).kind
        self.teacher = self._load(teacher)
        self.task: Task | None = build_task(task, records.rows(Label, "labels"), 1) if config.without else None
        self.scored: Record | None = None
        """A record that went well."""

    def work(self, part: RecordsPart) -> ScoredPart:
        records = from_table(Record, read_part(part.uri))
        _check_unique(part.uri, records)
        asked = records
        if part.without is not None and self.task is not None:
            asked = [self.task.without(record, part.without) for record in records if record.split != "train"]
        rows: list[TeacherScores] = []
        complaints: list[str] = []
        for start in range(0, len(asked), self.batch_size):
            rows += self._rank(asked[start : start + self.batch_size], complaints)
        if len(complaints) == len(asked) > 1:
            raise RuntimeError(f"{part.path}: the teacher failed on every one of {len(asked)} records: {complaints[0]}")
        file, rows = self.artifact.write_part_once(part.path, TeacherScores, rows)
        return ScoredPart(
            table=part.table,
            path=part.path,
            read=len(records),
            files=[file],
            judged=_judge(rows, asked),
            failed=dict(
                Counter(row.reason or "" for row in rows if row.status == "failed")
                + Counter(member for row in rows for member in row.silent)
            ),
            complaint=complaints[0] if complaints else None,
        )

    def _load(self, artifact: Artifact) -> Teacher:
        teacher = build_teacher(_settings(artifact))
        with tempfile.TemporaryDirectory() as folder:
            storage.download_folder(artifact.file_uri("teacher"), folder)
            teacher.load(Path(folder))
        return teacher

    def _rank(self, records: Sequence[Record], complaints: list[str]) -> list[TeacherScores]:
        """One row per record, in order; a record that the teacher raises on fails, its neighbours do not."""
        try:
            rows = self.teacher.score(records)
        except UserError:
            raise
        except Exception:
            rows = [self._rank_alone(record, complaints) for record in records]
            if self.scored is not None:
                # if this raises too, the teacher is broken, not a record
                self.teacher.score([self.scored])
        if [row.record_id for row in rows] != [record.record_id for record in records]:
            raise RuntimeError(f"the teacher {self.name!r} did not return one row per record, in order")
        rows = [_checked(row) for row in rows]
        well = (record for record, row in zip(records, rows, strict=True) if row.status == "ok")
        self.scored = next(well, self.scored)
        return rows

    def _rank_alone(self, record: Record, complaints: list[str]) -> TeacherScores:
        try:
            return self.teacher.score([record])[0]
        except UserError:
            raise
        except Exception as error:
            kind = type(error).__name__
            complaints.append(f"record {record.record_id!r}: {kind}: {' '.join(str(error).split())}")
            # not its words: they may name what differs from run to run, and would make each row a reason of its own
            return _failed(record.record_id, record.split, self.name, f"{RAISED}_{kind}")


def _score(artifact: Artifact, config: Score, task: AnyTask, teacher: Artifact, records: Artifact) -> list[ScoredPart]:
    files, resources = records.table_files("records"), config.resources
    parts = [
        RecordsPart(
            table=table,
            path=file.path.replace("records/", f"{table}/", 1),
            uri=records.file_uri(file.path),
            without=modality,
        )
        for table, modality in [("scores", None), *((f"without_{modality}", modality) for modality in config.without)]
        for file in files
    ]
    progress = Progress("score", sum(file.rows or 0 for file in files) * (1 + len(config.without)), "records")
    made: list[ScoredPart] = []
    # a pool of fixed size: one that grows would wait for teachers that start slowly while others take the processors
    actors = min(resources.actors, len(parts))
    for part in map_parts(
        artifact,
        parts,
        ScoredPart,
        TeacherActor,
        (artifact, config, task, teacher, records),
        actors=(actors, actors),
        cpus=resources.cpus_per_actor,
        gpus=resources.gpus_per_actor,
    ):
        progress.add(part.read)
        made.append(part)
    if [part.path for part in made] != [part.path for part in parts]:
        raise RuntimeError(f"{artifact.name}: {len(parts)} parts went in, {len(made)} came out")
    return made


def _settings(teacher: Artifact) -> AnyTeacher:
    return from_data(Fit, teacher.manifest.config["fit"]).teacher


def _check_unique(uri: str, records: Sequence[Record]) -> None:
    seen: set[str] = set()
    for record in records:
        if record.record_id in seen:
            raise UserError(f"{uri}: record_id: {record.record_id!r} occurs more than once")
        seen.add(record.record_id)


def _checked(row: TeacherScores) -> TeacherScores:
    """The row, or why it is no ranking."""
    if row.status == "failed":
        return row
    if len(row.labels) != len(row.scores):
        return _failed(row.record_id, row.split, row.teacher, "labels_and_scores_differ_in_length")
    if not all(map(math.isfinite, row.scores)):
        return _failed(row.record_id, row.split, row.teacher, "score_not_finite")
    return row


def _failed(record_id: str, split: Any, teacher: str, reason: str) -> TeacherScores:
    return TeacherScores(
        record_id=record_id, split=split, teacher=teacher, labels=[], scores=[], status="failed", reason=reason
    )


def _judge(rows: Sequence[TeacherScores], records: Sequence[Record]) -> dict[str, int]:
    """The teacher on the validation split; a record that it could not score is wrong."""
    judged = [(row, record.label_id) for row, record in zip(rows, records, strict=True) if row.split == "validation"]
    return {
        "records": len(judged),
        "top_1": sum(label in row.labels[:1] for row, label in judged),
        "top_10": sum(label in row.labels[:10] for row, label in judged),
        "ok": sum(row.status == "ok" for row, _ in judged),
    }


def _shares(judged: Sequence[dict[str, int]]) -> dict[str, Any]:
    total = Counter(dict.fromkeys(("records", "top_1", "top_10", "ok"), 0))
    for counts in judged:
        total.update(counts)
    if not total["records"]:
        return {}
    return {
        "top_1_accuracy": round(total["top_1"] / total["records"], 4),
        "top_10_accuracy": round(total["top_10"] / total["records"], 4),
        "coverage": round(total["ok"] / total["records"], 4),
        "records": total["records"],
    }
