"""Ask the teacher to rank every label of every record, part by part, from storage to storage, each part once."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mint_ray import lineage, storage
from mint_ray.artifacts import Artifact, File, read_part
from mint_ray.config.loader import UserError, from_data, one_line
from mint_ray.config.stages import Fit, Score
from mint_ray.images import Frame, ImageError, Pixels
from mint_ray.metrics import MAX_K
from mint_ray.records import Label, Record, TeacherScores, from_table
from mint_ray.runtime.images import COLUMNS, decode_images, memory_to_decode, seen_images
from mint_ray.runtime.map_parts import Preprocessing, actor_pool, map_parts
from mint_ray.tasks import Task, build_task
from mint_ray.tasks.config import AnyTask
from mint_ray.teachers import ImageTeacher, Teacher, build_teacher
from mint_ray.teachers.config import AnyTeacher
from mint_ray.telemetry import Progress, record_failed_rows, record_metric

logger = logging.getLogger("mint_ray")

RAISED = "teacher_raised"

Image = Pixels | ImageError | None


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
    first_id: str | None
    """Least record id of the part that was read; None of a part without rows."""
    last_id: str | None
    files: list[File]
    judged: dict[str, int]
    """Of the validation split: `records`, and how many of them have their label in the `top_1`, the `top_k`, are
    `ok`."""
    failed: dict[str, int]
    """Records without a ranking, by reason, and answers that an ensemble had to do without, by member."""
    complaint: str | None
    """What the teacher said of the first record that it raised on."""


def score_records(root: str, config: Score, task: AnyTask, teacher: Artifact, records: Artifact) -> Artifact:
    """Table `scores`, one row per record, and a table `without_x` of held-out records for each modality left out.

    The parts of each table are parallel to those of the records: same index, same order of rows. A record that the
    teacher cannot score keeps its row, with status `failed` and a reason. Images are decoded by tasks of their own, a
    few parts ahead of a teacher that looks at them. Raises UserError for a record that occurs twice, and for parts that
    are not in the order of their record ids; what a teacher raises on every record of a part ends the run.
    """
    artifact = lineage.score(root, config, task, teacher, records)
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
        self.task = _task(config, task, records)
        self.scored: tuple[list[Record], list[Image] | None] | None = None
        """A record that went well, and its image."""

    def work(self, part: RecordsPart, decoded: pa.Table | None = None) -> ScoredPart:
        """`decoded` is what a `Decoder` made of the part; without it the teacher reads its images itself."""
        records = from_table(Record, read_part(part.uri))
        _check_unique(part.uri, records)
        asked = _asked(part, records, self.task)
        images = None if decoded is None else seen_images(decoded)
        rows: list[TeacherScores] = []
        complaints: list[str] = []
        for start in range(0, len(asked), self.batch_size):
            here = slice(start, start + self.batch_size)
            began = time.monotonic()
            rows += self._rank(asked[here], None if images is None else images[here], complaints)
            record_metric("teacher_batch_seconds", time.monotonic() - began, run=self.artifact.name)
        if len(complaints) == len(asked) > 1:
            raise RuntimeError(f"{part.path}: the teacher failed on every one of {len(asked)} records: {complaints[0]}")
        file, rows = self.artifact.write_part_once(part.path, TeacherScores, rows)
        failed = Counter(row.reason or "" for row in rows if row.status == "failed")
        record_metric("records_scored", len(rows), run=self.artifact.name)
        record_failed_rows("score", self.artifact.name, failed)
        ids = [record.record_id for record in records]
        return ScoredPart(
            table=part.table,
            path=part.path,
            read=len(records),
            first_id=min(ids, default=None),
            last_id=max(ids, default=None),
            files=[file],
            judged=_judge(rows, asked),
            failed=dict(failed + Counter(member for row in rows for member in row.silent)),
            complaint=complaints[0] if complaints else None,
        )

    def _load(self, artifact: Artifact) -> Teacher:
        teacher = build_teacher(_settings(artifact))
        with tempfile.TemporaryDirectory() as folder:
            storage.download_folder(artifact.file_uri("teacher"), folder)
            teacher.load(Path(folder))
        return teacher

    def _rank(
        self, records: Sequence[Record], images: Sequence[Image] | None, complaints: list[str]
    ) -> list[TeacherScores]:
        """One row per record, in order; a record that the teacher raises on fails, its neighbours do not."""
        try:
            rows = self._ask(records, images)
        except UserError:
            raise
        except Exception:
            rows = [
                self._rank_alone(record, images and images[place : place + 1], complaints)
                for place, record in enumerate(records)
            ]
            if self.scored is not None:
                # if this raises too, the teacher is broken, not a record
                self._ask(*self.scored)
        if [row.record_id for row in rows] != [record.record_id for record in records]:
            raise RuntimeError(f"the teacher {self.name!r} did not return one row per record, in order")
        rows = [_checked(row) for row in rows]
        well = next((place for place, row in enumerate(rows) if row.status == "ok"), None)
        if well is not None:
            # a copy of its image: that itself would keep those of the whole part in Ray's object store
            image = None if images is None else [_copied(images[well])]
            self.scored = [records[well]], image
        return rows

    def _rank_alone(self, record: Record, image: Sequence[Image] | None, complaints: list[str]) -> TeacherScores:
        try:
            return self._ask([record], image)[0]
        except UserError:
            raise
        except Exception as error:
            kind = type(error).__name__
            complaints.append(f"record {record.record_id!r}: {kind}: {one_line(error)}")
            # not its words: they may name what differs from run to run, and would make each row a reason of its own
            return _failed(record.record_id, record.split, self.name, f"{RAISED}_{kind}")

    def _ask(self, records: Sequence[Record], images: Sequence[Image] | None) -> list[TeacherScores]:
        if images is None or not isinstance(self.teacher, ImageTeacher):
            return self.teacher.score(records)
        return self.teacher.score_images(records, images)


class Decoder:
    """Decodes the images of one part of the records, for a `TeacherActor`."""

    columns = COLUMNS

    def __init__(self, frame: Frame, config: Score, task: AnyTask, records: Artifact) -> None:
        self.frame = frame
        self.task = functools.cache(lambda: _task(config, task, records))

    def work(self, part: RecordsPart) -> pa.Table:
        task = None if part.without is None else self.task()
        asked = _asked(part, from_table(Record, read_part(part.uri)), task)
        return decode_images([record.image_uri for record in asked], self.frame)


def _score(artifact: Artifact, config: Score, task: AnyTask, teacher: Artifact, records: Artifact) -> list[ScoredPart]:
    files, resources = records.table_files("records"), config.resources
    parts = [
        RecordsPart(
            table=table,
            path=file.path.replace("records/", f"{table}/", 1),
            uri=records.file_uri(file.path),
            without=modality,
        )
        for table, modality in [("scores", None), *((f"without_{modality}", modality) for modality in config.ablate)]
        for file in files
    ]
    frame = frame_of(teacher)
    preprocessing = None
    if frame is not None:
        preprocessing = Preprocessing(
            worker=Decoder,
            arguments=(frame, config, task, records),
            cpus=resources.decode_cpus,
            memory=memory_to_decode(max(file.rows or 0 for file in files), frame),
            max_tasks=resources.max_decode_tasks,
        )
    progress = Progress("score", sum(file.rows or 0 for file in files) * (1 + len(config.ablate)), "records")
    made: list[ScoredPart] = []
    workers = actor_pool(TeacherActor, (artifact, config, task, teacher, records), resources)
    for part in map_parts(artifact, parts, ScoredPart, workers, preprocessing=preprocessing):
        progress.advance(part.read)
        _check_order(records, made[-1] if made else None, part)
        made.append(part)
    if [part.path for part in made] != [part.path for part in parts]:
        raise RuntimeError(f"{artifact.name}: {len(parts)} parts went in, {len(made)} came out")
    return made


def frame_of(teacher: Artifact) -> Frame | None:
    """The form in which the teacher wants its images decoded ahead of it; None for one that looks at none."""
    built = build_teacher(_settings(teacher))
    return built.frame() if isinstance(built, ImageTeacher) else None


def _task(config: Score, task: AnyTask, records: Artifact) -> Task | None:
    """What knows how to leave a modality out, if any is to be."""
    return build_task(task, records.rows(Label, "labels"), 1) if config.ablate else None


def _asked(part: RecordsPart, records: Sequence[Record], task: Task | None) -> Sequence[Record]:
    """The records of a part as the teacher is to see them."""
    if part.without is None or task is None:
        return records
    return [task.ablate(record, part.without) for record in records if record.split != "train"]


def _copied(image: Image) -> Image:
    return np.array(image) if isinstance(image, np.ndarray) else image


def _settings(teacher: Artifact) -> AnyTeacher:
    return from_data(Fit, teacher.manifest.config["fit"]).teacher


def _check_unique(uri: str, records: Sequence[Record]) -> None:
    seen: set[str] = set()
    for record in records:
        if record.record_id in seen:
            raise UserError(f"{uri}: record_id: {record.record_id!r} occurs more than once")
        seen.add(record.record_id)


def _check_order(records: Artifact, before: ScoredPart | None, part: ScoredPart) -> None:
    """Raise UserError unless the ids of `part` come behind those of the part ahead of it, so that none is in both."""
    if before is None or before.table != part.table or before.last_id is None or part.first_id is None:
        return
    if part.first_id <= before.last_id:
        raise UserError(
            f"{records.uri}: record_id: {part.path} starts with {part.first_id!r}, which does not come behind "
            f"{before.last_id!r} in the part before it: records lie in the order of their ids, each once"
        )


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
        "top_k": sum(label in row.labels[:MAX_K] for row, label in judged),
        "ok": sum(row.status == "ok" for row, _ in judged),
    }


def _shares(judged: Sequence[dict[str, int]]) -> dict[str, Any]:
    total = Counter(dict.fromkeys(("records", "top_1", "top_k", "ok"), 0))
    for counts in judged:
        total.update(counts)
    if not total["records"]:
        return {}
    return {
        "top_1_accuracy": round(total["top_1"] / total["records"], 4),
        "top_k_accuracy": round(total["top_k"] / total["records"], 4),
        "coverage": round(total["ok"] / total["records"], 4),
        "records": total["records"],
    }
