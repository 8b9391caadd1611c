"""Let base and aligned student answer the test records, and measure both beside the teacher."""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import torch

from mint_ray import storage
from mint_ray.artifacts import Artifact, open_artifact
from mint_ray.loading import dump, from_data
from mint_ray.metrics import measure
from mint_ray.records import Label, Message, Prediction, Record, TeacherScores, from_table, schema_of, to_table
from mint_ray.samplers import AnySampler
from mint_ray.stages.config import Evaluate, Train
from mint_ray.stages.session import map_rows
from mint_ray.students import StudentGenerator, student_revision
from mint_ray.students.config import Student
from mint_ray.tasks import build_task
from mint_ray.tasks.config import AnyTask
from mint_ray.telemetry import Progress

logger = logging.getLogger("mint_ray")

BASE, ALIGNED, TEACHER = "base student", "aligned student", "teacher"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One prompt to be answered."""

    record_id: str
    prompt: list[Message]


def evaluate_student(
    root: str,
    config: Evaluate,
    task: AnyTask,
    sampler: AnySampler,
    records: Artifact,
    scores: Artifact,
    student: Artifact,
) -> Artifact:
    """Table `predictions` (every method, every record of the split) and `metrics.json`."""
    lengths = {"top": sampler.top, "bottom": sampler.rejected_length}
    inputs = {"records": records.name, "scores": scores.name, "student": student.name}
    settings = {"evaluate": dump(config), "task": dump(task), "lists": lengths}
    artifact = open_artifact(root, "evaluate", settings, inputs)
    if artifact.is_complete:
        return artifact
    held_out = [record for record in records.rows(Record, "records") if record.split == config.split]
    with artifact.write() as draft:
        predictions = {
            method: _by_teacher(scores.rows(TeacherScores, table), held_out, method, sampler.top)
            for method, table in _teacher_tables(scores)
        }
        settings_of_student = from_data(Train, student.manifest.config["train"]).student
        for method, adapter in ((BASE, None), (ALIGNED, student)):
            answers = answer_records(root, config, task, sampler.top, records, settings_of_student, adapter)
            predictions[method] = answers.rows(Prediction, "answers")
        rankings = {
            row.record_id: row.labels for row in scores.rows(TeacherScores, "scores") if row.split == config.split
        }
        for method, rows in predictions.items():
            measured = measure(
                rows,
                truth={record.record_id: record.label_id or "" for record in held_out},
                teacher=rankings,
                group={record.record_id: record.group_id for record in held_out},
                top=sampler.top,
                bottom=sampler.rejected_length,
                resamples=config.resamples,
                confidence=config.confidence,
                seed=config.seed,
            )
            draft.metrics[method] = {metric: dataclasses.asdict(estimate) for metric, estimate in measured.items()}
            draft.dropped.update(f"{method}: {row.reason}" for row in rows if row.reason)
        draft.write_rows(Prediction, "predictions", (row for rows in predictions.values() for row in rows))
        draft.counts["records"] = len(held_out)
        draft.counts["groups"] = len({record.group_id for record in held_out})
        draft.write_text("metrics.json", json.dumps(draft.metrics, indent=1))
    return artifact


def answer_records(
    root: str,
    config: Evaluate,
    task: AnyTask,
    length: int,
    records: Artifact,
    student: Student,
    adapter: Artifact | None,
) -> Artifact:
    """Table `answers` of one student on the records of the split; kept apart, so that the base student answers once."""
    inputs = {"records": records.name, "student": adapter.name if adapter else student_revision(student)}
    settings = {
        # not its LoRA settings: they are in the adapter's name, and the base student has none
        "student": {"model_id": student.model_id, "revision": student.revision, "dtype": student.dtype},
        "split": config.split,
        "generation": dump(config.generation),
        "task": dump(task),
        "length": length,
    }
    artifact = open_artifact(root, "answer", settings, inputs)
    if artifact.is_complete:
        return artifact
    asked = build_task(task, records.rows(Label, "labels"), length)
    with artifact.write() as draft:
        held_out = [record for record in records.rows(Record, "records") if record.split == config.split]
        questions = [Question(record_id=record.record_id, prompt=asked.prompt(record)) for record in held_out]
        progress = Progress(f"answer ({ALIGNED if adapter else BASE})", len(questions), "records")
        arguments = (student, config, adapter)
        rows: list[Prediction] = []
        for batch in map_rows(to_table(questions, Question), StudentActor, arguments, config.resources, progress):
            for row in batch.to_pylist():
                read = asked.parse(row["text"])
                rows.append(
                    Prediction(
                        record_id=row["record_id"],
                        method=ALIGNED if adapter else BASE,
                        labels=read.labels,
                        text=row["text"],
                        reason=read.reason,
                    )
                )
        draft.counts["answers"] = draft.write_rows(Prediction, "answers", rows)
        draft.dropped.update(row.reason for row in rows if row.reason)
    return artifact


class StudentActor:
    """Holds one student on a worker and answers batches of prompts."""

    def __init__(self, student: Student, config: Evaluate, adapter: Artifact | None) -> None:
        torch.set_num_threads(max(1, int(config.resources.cpus_per_actor)))
        self.folder = tempfile.TemporaryDirectory()
        if adapter is not None:
            storage.download_folder(adapter.file_uri("adapter"), self.folder.name)
        weights = Path(self.folder.name) if adapter else None
        batch_size = config.resources.batch_size
        self.generator = StudentGenerator(student, config.generation, weights, batch_size=batch_size)

    def __call__(self, batch: pa.Table) -> pa.Table:
        questions = from_table(Question, batch.cast(schema_of(Question)))
        answers = self.generator.generate([question.prompt for question in questions])
        return pa.table({"record_id": batch["record_id"], "text": pa.array(answers, pa.string())})


def _teacher_tables(scores: Artifact) -> list[tuple[str, str]]:
    tables = scores.tables()
    without = [table for table in tables if table.startswith("without_")]
    return [(TEACHER, "scores"), *((f"{TEACHER} {table.replace('_', ' ')}", table) for table in without)]


def _by_teacher(
    scores: Sequence[TeacherScores], held_out: Sequence[Record], method: str, length: int
) -> list[Prediction]:
    """The teacher's own answer: as many labels as the student may name, so that both are judged on equal lists."""
    by_id = {row.record_id: row for row in scores}
    return [
        Prediction(
            record_id=record.record_id, method=method,
            labels=by_id[record.record_id].labels[:length], text="", reason=by_id[record.record_id].reason,
        )
        for record in held_out
    ]  # fmt: skip
