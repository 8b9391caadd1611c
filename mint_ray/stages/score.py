"""Ask the teacher to rank every label of every record, on as many actors as the cluster has."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from mint_ray import storage
from mint_ray.artifacts import Artifact, open_artifact
from mint_ray.loading import dump, from_data
from mint_ray.records import Label, Record, TeacherScores, from_table, schema_of, to_table
from mint_ray.stages.config import Fit, Score, ScoreResources
from mint_ray.stages.session import map_rows
from mint_ray.tasks import build_task
from mint_ray.tasks.config import AnyTask
from mint_ray.teachers import build_teacher
from mint_ray.telemetry import Progress

logger = logging.getLogger("mint_ray")


def score_records(root: str, config: Score, task: AnyTask, teacher: Artifact, records: Artifact) -> Artifact:
    """Table `scores`, one row per record, and a table `without_x` of held-out records for each modality left out."""
    inputs = {"records": records.name, "teacher": teacher.name}
    artifact = open_artifact(root, "score", {"score": dump(config), "task": dump(task)}, inputs)
    if artifact.is_complete:
        return artifact
    labels, everyone = records.rows(Label, "labels"), records.rows(Record, "records")
    asked = build_task(task, labels, 1)
    with artifact.write() as draft:
        views = {"scores": everyone}
        for modality in config.without:
            held_out = [record for record in everyone if record.split != "train"]
            views[f"without_{modality}"] = [asked.without(record, modality) for record in held_out]
        for table, view in views.items():
            scores = list(_score(table, view, teacher, config.resources))
            draft.write_rows(TeacherScores, table, scores)
            draft.counts[table] = len(scores)
            draft.dropped.update(f"{table}: {row.reason}" for row in scores if row.status == "failed")
            draft.dropped.update(f"{table}: {member}" for row in scores for member in row.silent)
            draft.metrics[table] = _judge(scores, everyone)
    logger.info("score: on validation %s", draft.metrics["scores"])
    return artifact


class TeacherActor:
    """Holds one teacher on a worker and ranks batches of records."""

    def __init__(self, teacher: Artifact) -> None:
        self.teacher = build_teacher(from_data(Fit, teacher.manifest.config["fit"]).teacher)
        with tempfile.TemporaryDirectory() as folder:
            storage.download_folder(teacher.file_uri("teacher"), folder)
            self.teacher.load(Path(folder))

    def __call__(self, batch: pa.Table) -> pa.Table:
        return to_table(self.teacher.score(from_table(Record, batch.cast(schema_of(Record)))), TeacherScores)


def _score(table: str, view: list[Record], teacher: Artifact, resources: ScoreResources) -> Iterator[TeacherScores]:
    progress = Progress(f"score {table}", len(view), "records")
    seen: set[str] = set()
    for batch in map_rows(to_table(view, Record), TeacherActor, (teacher,), resources, progress):
        rows = from_table(TeacherScores, batch.cast(schema_of(TeacherScores)))
        seen.update(row.record_id for row in rows)
        yield from rows
    if seen != {record.record_id for record in view}:
        raise RuntimeError(f"{table}: {len(view)} records went in, {len(seen)} came out")


def _judge(scores: list[TeacherScores], records: list[Record]) -> dict[str, Any]:
    """The teacher on the validation split; a record that it could not score is wrong."""
    truth = {record.record_id: record.label_id for record in records}
    judged = [row for row in scores if row.split == "validation"]
    if not judged:
        return {}

    def share(hits: int) -> float:
        return round(hits / len(judged), 4)

    return {
        "top_1_accuracy": share(sum(truth[row.record_id] in row.labels[:1] for row in judged)),
        "top_10_accuracy": share(sum(truth[row.record_id] in row.labels[:10] for row in judged)),
        "coverage": share(sum(row.status == "ok" for row in judged)),
        "records": len(judged),
    }
