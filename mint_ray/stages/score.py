"""Score every label of every record with the teacher, one part of the records at a time."""

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
from mint_ray.artifacts import Artifact, PartResult, read_part
from mint_ray.config.loader import UserError, from_data, one_line
from mint_ray.config.stages import Fit, Score
from mint_ray.images import Frame, Images
from mint_ray.lineage import ABLATION
from mint_ray.metrics import MAX_K
from mint_ray.records import Label, Record, TeacherScores, from_table
from mint_ray.runtime.images import COLUMNS, decode_images, decoded_images, decoding_memory
from mint_ray.runtime.map_parts import Part, Preprocessing, actor_pool, map_parts
from mint_ray.tasks import Task, build_task
from mint_ray.tasks.config import AnyTask
from mint_ray.teachers import ImageTeacher, Teacher, build_teacher
from mint_ray.teachers.config import AnyTeacher
from mint_ray.telemetry import Progress, record_failed_rows, record_metric

logger = logging.getLogger("mint_ray")

RAISED = "teacher_raised"
"""Start of the reason of a record for which the teacher raised an exception; the type of the exception follows."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RecordsPart(Part):
    """One part of the records, with all modalities or without one: the work of one task."""

    table: str
    """Table that is written."""
    ablated: str | None = None
    """Modality to ablate."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScoredPart(PartResult):
    """The scores of one part of the records, as the driver sees them."""

    table: str
    first_id: str | None
    """Smallest record id of the part that was read; None for a part without rows."""
    last_id: str | None
    """Largest record id."""
    validation: dict[str, int]
    """Counts on the validation split: `records`, those with their label in the `top_1` and in the `top_k`, and those
    that are `ok`."""
    error: str | None
    """Message of the first exception that the teacher raised for a record."""


def score_records(root: str, config: Score, task: AnyTask, teacher: Artifact, records: Artifact) -> Artifact:
    """Write table `scores`, one row per record, and a table `without_x` of held-out records for each ablated modality.

    The parts of each table are parallel to those of the records: same number, same order of rows. A record that the
    teacher cannot score keeps its row, with status `failed` and a reason. For a teacher that takes images, they are
    decoded a few parts ahead by tasks of their own.

    Raises:
        UserError: A record id occurs twice, or the records are not in the order of their ids.
        RuntimeError: The teacher raised an exception for every record of a part.
    """
    artifact = lineage.score(root, config, task, teacher, records)
    if artifact.is_complete:
        return artifact
    with artifact.write() as draft:
        parts = _score(artifact, config, task, teacher, records)
        for part in parts:
            draft.add_part(part)
        for table in dict.fromkeys(part.table for part in parts):
            draft.metrics[table] = _measure([part.validation for part in parts if part.table == table])
        errors = [part.error for part in parts if part.error]
        if errors:
            logger.warning("score: the teacher raised exceptions, the first for %s", errors[0])
    logger.info("score: on validation %s", draft.metrics["scores"])
    return artifact


class TeacherActor:
    """Actor that scores the labels of one part of the records at a time with the teacher that it loads."""

    def __init__(self, artifact: Artifact, config: Score, task: AnyTask, teacher: Artifact, records: Artifact) -> None:
        self.artifact, self.batch_size = artifact, config.resources.batch_size
        self.name = _settings(teacher).kind
        self.teacher = self._load(teacher)
        self.task = _task(config, task, records)
        self.last_scored: tuple[list[Record], Images | None] | None = None
        """A record that was scored without an error, and its image."""

    def work(self, part: RecordsPart, decoded: pa.Table | None = None) -> ScoredPart:
        """Score and write one part; `decoded` has its images (`ImageDecoder`), without it the teacher reads them."""
        read = from_table(Record, read_part(part.uri))
        _check_unique(part.uri, read)
        records = _select_records(part, read, self.task)
        images = None if decoded is None else decoded_images(decoded)
        rows: list[TeacherScores] = []
        errors: list[str] = []
        for start in range(0, len(records), self.batch_size):
            batch = slice(start, start + self.batch_size)
            began = time.monotonic()
            rows += self._score_batch(records[batch], None if images is None else images[batch], errors)
            record_metric("teacher_batch_seconds", time.monotonic() - began, run=self.artifact.name)
        if len(errors) == len(records) > 1:
            raise RuntimeError(f"{part.path}: the teacher raised for each of its {len(records)} records: {errors[0]}")
        file, rows = self.artifact.write_part_once(part.path, TeacherScores, rows)
        failed = Counter(row.reason or "" for row in rows if row.status == "failed")
        record_metric("records_scored", len(rows), run=self.artifact.name)
        record_failed_rows("score", self.artifact.name, failed)
        # members of an ensemble that could not score are counted, too
        failed.update(member for row in rows for member in row.silent)
        ids = [record.record_id for record in read]
        return ScoredPart(
            table=part.table,
            path=part.path,
            rows=len(read),
            first_id=min(ids, default=None),
            last_id=max(ids, default=None),
            files=[file],
            counts={part.table: len(rows)},
            dropped={f"{part.table}: {reason}": count for reason, count in failed.items()},
            validation=_count_correct(rows, records),
            error=errors[0] if errors else None,
        )

    def _load(self, artifact: Artifact) -> Teacher:
        teacher = build_teacher(_settings(artifact))
        with tempfile.TemporaryDirectory() as folder:
            storage.download_folder(artifact.file_uri("teacher"), folder)
            teacher.load(Path(folder))
        return teacher

    def _score_batch(self, records: Sequence[Record], images: Images | None, errors: list[str]) -> list[TeacherScores]:
        """Return one row per record, in order. A record for which the teacher raises fails; the others do not."""
        try:
            rows = self._call_teacher(records, images)
        except UserError:
            raise
        except Exception:
            rows = [
                self._score_alone(record, images and images[index : index + 1], errors)
                for index, record in enumerate(records)
            ]
            if self.last_scored is not None:
                # if this raises too, the fault is the teacher's, not that of a record
                self._call_teacher(*self.last_scored)
        if [row.record_id for row in rows] != [record.record_id for record in records]:
            raise RuntimeError(f"the teacher {self.name!r} did not return one row per record, in order")
        rows = [_validate(row) for row in rows]
        ok = next((index for index, row in enumerate(rows) if row.status == "ok"), None)
        if ok is not None:
            # a copy, as a view would keep all images of the part in Ray's object store
            image = None if images is None else [_copy(images[ok])]
            self.last_scored = [records[ok]], image
        return rows

    def _score_alone(self, record: Record, image: Images | None, errors: list[str]) -> TeacherScores:
        try:
            return self._call_teacher([record], image)[0]
        except UserError:
            raise
        except Exception as error:
            kind = type(error).__name__
            errors.append(f"record {record.record_id!r}: {kind}: {one_line(error)}")
            # the type alone: messages may differ from run to run, and each would be a reason of its own
            return _failed(record.record_id, record.split, self.name, f"{RAISED}_{kind}")

    def _call_teacher(self, records: Sequence[Record], images: Images | None) -> list[TeacherScores]:
        if images is None or not isinstance(self.teacher, ImageTeacher):
            return self.teacher.score(records)
        return self.teacher.score_images(records, images)


class ImageDecoder:
    """Task that decodes the images of one part of the records, for a `TeacherActor`."""

    columns = COLUMNS

    def __init__(self, frame: Frame, config: Score, task: AnyTask, records: Artifact) -> None:
        self.frame = frame
        self.task = functools.cache(lambda: _task(config, task, records))

    def work(self, part: RecordsPart) -> pa.Table:
        """Decode the images of one part."""
        task = None if part.ablated is None else self.task()
        records = _select_records(part, from_table(Record, read_part(part.uri)), task)
        return decode_images([record.image_uri for record in records], self.frame)


def frame_of(teacher: Artifact) -> Frame | None:
    """Return the format in which the teacher takes images; None for a teacher that takes none or reads them itself."""
    built = build_teacher(_settings(teacher))
    return built.frame() if isinstance(built, ImageTeacher) else None


def _score(artifact: Artifact, config: Score, task: AnyTask, teacher: Artifact, records: Artifact) -> list[ScoredPart]:
    files, resources = records.table_files("records"), config.resources
    parts = [
        RecordsPart(
            table=table,
            path=file.path.replace("records/", f"{table}/", 1),
            uri=records.file_uri(file.path),
            ablated=modality,
        )
        for table, modality in [("scores", None), *((f"{ABLATION}{modality}", modality) for modality in config.ablate)]
        for file in files
    ]
    frame = frame_of(teacher)
    preprocessing = None
    if frame is not None:
        preprocessing = Preprocessing(
            worker=ImageDecoder,
            arguments=(frame, config, task, records),
            cpus=resources.decode_cpus,
            memory=decoding_memory(max(file.rows or 0 for file in files), frame),
            max_tasks=resources.max_decode_tasks,
        )
    progress = Progress("score", sum(file.rows or 0 for file in files) * (1 + len(config.ablate)), "records")
    scored: list[ScoredPart] = []
    workers = actor_pool(TeacherActor, (artifact, config, task, teacher, records), resources)
    for part in map_parts(artifact, parts, ScoredPart, workers, preprocessing=preprocessing):
        progress.advance(part.rows)
        _check_order(records, scored[-1] if scored else None, part)
        scored.append(part)
    if [part.path for part in scored] != [part.path for part in parts]:
        raise RuntimeError(f"{artifact.name}: {len(scored)} of {len(parts)} parts were returned")
    return scored


def _task(config: Score, task: AnyTask, records: Artifact) -> Task | None:
    """Return the task, which ablates modalities; None if none is ablated."""
    return build_task(task, records.rows(Label, "labels"), 1) if config.ablate else None


def _select_records(part: RecordsPart, records: Sequence[Record], task: Task | None) -> Sequence[Record]:
    """Return the records that the teacher scores: all of the part, or for an ablation the held-out ones, ablated."""
    if part.ablated is None or task is None:
        return records
    return [task.ablate(record, part.ablated) for record in records if record.split != "train"]


def _copy(image: Any) -> Any:
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
    """Raise UserError unless every id of `part` is greater than those of the part before it: then none is in both."""
    if before is None or before.table != part.table or before.last_id is None or part.first_id is None:
        return
    if part.first_id <= before.last_id:
        raise UserError(
            f"{records.uri}: record_id: {part.path} has {part.first_id!r}, and the part before it has "
            f"{before.last_id!r}; records must be in the order of their ids, each once"
        )


def _validate(row: TeacherScores) -> TeacherScores:
    """Return the row, or a failed row if it is not a ranking."""
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


def _count_correct(rows: Sequence[TeacherScores], records: Sequence[Record]) -> dict[str, int]:
    """Return the counts of `ScoredPart.validation`; a record that could not be scored counts as wrong."""
    pairs = [(row, record.label_id) for row, record in zip(rows, records, strict=True) if row.split == "validation"]
    return {
        "records": len(pairs),
        "top_1": sum(label in row.labels[:1] for row, label in pairs),
        "top_k": sum(label in row.labels[:MAX_K] for row, label in pairs),
        "ok": sum(row.status == "ok" for row, _ in pairs),
    }


def _measure(parts: Sequence[dict[str, int]]) -> dict[str, Any]:
    """Return the metrics of a table on the validation split, from the counts of its parts; none without records."""
    total = Counter(dict.fromkeys(("records", "top_1", "top_k", "ok"), 0))
    for counts in parts:
        total.update(counts)
    if not total["records"]:
        return {}
    return {
        "top_1_accuracy": round(total["top_1"] / total["records"], 4),
        "top_k_accuracy": round(total["top_k"] / total["records"], 4),
        "coverage": round(total["ok"] / total["records"], 4),
        "records": total["records"],
    }
