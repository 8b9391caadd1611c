"""Let base and aligned student answer the test records, and measure both beside the teacher."""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from mint_ray import storage
from mint_ray.artifacts import Artifact, File, open_artifact, read_part
from mint_ray.config.loader import UserError, dump, from_data
from mint_ray.config.stages import Evaluate, EvaluateResources, Train
from mint_ray.images import ImageError
from mint_ray.metrics import measure
from mint_ray.models.vision_processor import View
from mint_ray.records import Label, Message, Prediction, Record, Split, TeacherScores, from_table
from mint_ray.retrievers.passages import put_ahead
from mint_ray.runtime.map_parts import map_parts
from mint_ray.samplers import AnySampler
from mint_ray.stages.benchmark import measure_general
from mint_ray.stages.retrieve import Passages, choose_passages
from mint_ray.students import Answers, StudentGenerator, student_revision
from mint_ray.students.config import Generation, Mode, Student
from mint_ray.tasks import Task, build_task
from mint_ray.tasks.config import AnyTask
from mint_ray.telemetry import Progress

logger = logging.getLogger("mint_ray")

BASE, ALIGNED, TEACHER = "base student", "aligned student", "teacher"
WITH_PASSAGES = " with passages"
"""What a student's method is called by that was given passages to read (`stages.retrieval`)."""
SUFFIX: dict[Mode, str] = {"free": "", "constrained": ", constrained", "rank": ", ranked"}
"""What a mode adds to the name of the method: no two of them are ever put together."""
RECORDS_PER_PART = 256
"""Records, of whatever split, that are read for one part of the answers: the work of one task. It is no setting, for
parts that are finished must mean the same to whoever goes on with them."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RecordsRange:
    """Some rows of one part of the records: the work of one task."""

    path: str
    """Of the part that is written."""
    uri: str
    """Of the part that is read."""
    start: int
    """The first of its rows that is asked about."""
    rows: int
    """How many there are, of whatever split."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AnsweredPart:
    """What a task made of some records: all that the driver ever sees of them."""

    path: str
    answers: int
    files: list[File]
    dropped: dict[str, int]
    """Answers that could not be read, by reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """Who is asked what, and how: what decides about the answers."""

    student: Student
    adapter: Artifact | None
    """What the student has learned; None for the base student."""
    generation: Generation
    mode: Mode
    splits: tuple[Split, ...]
    task: AnyTask
    length: int
    passages: Artifact | None = None
    """What stands ahead of each note; None for the prompt alone."""

    @property
    def method(self) -> str:
        reading = WITH_PASSAGES if self.passages else ""
        return f"{ALIGNED if self.adapter else BASE}{reading}{SUFFIX[self.mode]}"

    def settings(self) -> dict[str, Any]:
        """What the answers are named by, beside the records and the student's weights."""
        read = {"free": ["max_new_tokens"], "constrained": [], "rank": ["normalise"]}[self.mode]
        return {
            # not its LoRA settings: they are in the adapter's name, and the base student has none
            "student": {key: getattr(self.student, key) for key in ("model_id", "revision", "dtype")},
            # of the settings those alone that the mode goes by, so that another mode does not ask again
            "generation": {"mode": self.mode, **{key: getattr(self.generation, key) for key in read}},
            "splits": list(self.splits),
            "task": dump(self.task),
            "length": self.length,
        }


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
        students: list[tuple[str, Artifact | None]] = [(BASE, None), (ALIGNED, student)]
        asked = (task, sampler.top, records, settings_of_student)
        splits = (config.split,)
        passages: dict[str, Artifact] = {}
        if config.retrieval is not None:
            passages = {name: choose_passages(root, config, *asked, adapter) for name, adapter in students}
        for mode in config.generation.modes:
            for name, adapter in students:
                for reading, ahead in (("", None), *([(WITH_PASSAGES, passages[name])] if passages else [])):
                    answers = answer_records(root, config, *asked, adapter, mode=mode, splits=splits, passages=ahead)
                    predictions[f"{name}{reading}{SUFFIX[mode]}"] = answers.rows(Prediction, "answers")
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
        if passages:
            draft.metrics["retrieval"] = {
                name + WITH_PASSAGES: chosen.manifest.metrics for name, chosen in passages.items()
            }
        if config.general is not None:
            draft.metrics["general"] = {
                name: measure_general(root, config, settings_of_student, adapter).manifest.metrics
                for name, adapter in students
            }
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
    *,
    mode: Mode = "free",
    splits: tuple[Split, ...] = ("test",),
    passages: Artifact | None = None,
) -> Artifact:
    """Table `answers` of one student on the records of `splits`, written part by part by the workers that asked it.

    Kept apart from what is made of them, so that the base student answers once. Of a ranking, each row has all labels,
    likeliest first, and their probabilities. Raises UserError, before work, for a label that an answer cannot name.
    """
    asked = Asked(
        student=student,
        adapter=adapter,
        generation=config.generation,
        mode=mode,
        splits=splits,
        task=task,
        length=length,
        passages=passages,
    )
    inputs = {"records": records.name, "student": adapter.name if adapter else student_revision(student)}
    if passages is not None:
        inputs["passages"] = passages.name
    artifact = open_artifact(root, "answer", asked.settings(), inputs)
    if artifact.is_complete:
        return artifact
    labels = records.rows(Label, "labels")
    if mode == "constrained":
        check_names(build_task(task, labels, length))
    ranges = [
        RecordsRange(
            path=f"answers/{file.path.removeprefix('records/').removesuffix('.parquet')}-{number:03d}.parquet",
            uri=records.file_uri(file.path),
            start=start,
            rows=RECORDS_PER_PART,
        )
        for file in records.table_files("records")
        for number, start in enumerate(range(0, max(file.rows or 0, 1), RECORDS_PER_PART))
    ]
    counts = records.manifest.counts
    progress = Progress(f"answer ({asked.method})", sum(counts[f"records_{split}"] for split in splits), "records")
    resources = config.resources
    actors = min(resources.actors, len(ranges))
    with artifact.write() as draft:
        for part in map_parts(
            artifact,
            ranges,
            AnsweredPart,
            StudentActor,
            (artifact, asked, labels, resources),
            actors=(actors, actors),
            cpus=resources.cpus_per_actor,
            gpus=resources.gpus_per_actor,
        ):
            progress.advance(part.answers)
            draft.placed += part.files
            draft.counts["answers"] += part.answers
            draft.dropped.update(part.dropped)
    return artifact


def check_names(task: Task) -> None:
    """Raise UserError if the task does not read a label in the answer that it writes for it."""
    for label in task.labels:
        text = task.answer([label.label_id])
        if task.parse(text).labels != [label.label_id]:
            raise UserError(
                f"evaluate.generation.modes: constrained: label {label.label_id!r} ({label.name!r}) cannot be read "
                f"back from {text!r}"
            )


class StudentActor:
    """Holds one student on a worker and asks it about the records of one part after the other."""

    def __init__(self, artifact: Artifact, asked: Asked, labels: Sequence[Label], resources: EvaluateResources) -> None:
        torch.set_num_threads(max(1, int(resources.cpus_per_actor)))
        self.artifact, self.asked = artifact, asked
        self.task = build_task(asked.task, labels, asked.length)
        self.label_ids = [label.label_id for label in labels]
        self.folder = tempfile.TemporaryDirectory()
        if asked.adapter is not None:
            storage.download_folder(asked.adapter.file_uri("adapter"), self.folder.name)
        rows = asked.passages.rows(Passages, "passages") if asked.passages else []
        self.passages = {row.record_id: row.text for row in rows}
        answers = Answers(labels=tuple(self.label_ids), length=asked.length, write=self.task.answer)
        self.generator = StudentGenerator(
            asked.student,
            asked.generation,
            Path(self.folder.name) if asked.adapter else None,
            answers=None if asked.mode == "free" else answers,
            batch_size=resources.batch_size,
        )
        self.batch_size = resources.batch_size

    def work(self, part: RecordsRange) -> AnsweredPart:
        table = read_part(part.uri).slice(part.start, part.rows)
        records = from_table(Record, table.filter(pc.is_in(table["split"], value_set=pa.array(self.asked.splits))))
        prompts = [self.task.prompt(record) for record in records]
        if self.asked.passages:
            prompts = [
                put_ahead(prompt, self.passages[record.record_id])
                for record, prompt in zip(records, prompts, strict=True)
            ]
        rows = self._look(records, prompts) if self.task.shows_image else self._answer(records, prompts)
        file, rows = self.artifact.write_part_once(part.path, Prediction, rows)
        dropped = Counter(row.reason for row in rows if row.reason)
        return AnsweredPart(path=part.path, answers=len(rows), files=[file], dropped=dict(dropped))

    def _look(self, records: Sequence[Record], prompts: Sequence[list[Message]]) -> list[Prediction]:
        """The answers to images, of which one batch is held at a time; one that cannot be looked at is not answered."""
        rows: list[Prediction] = []
        for start in range(0, len(records), self.batch_size):
            batch = slice(start, start + self.batch_size)
            views: dict[str, View] = {}
            unseen: dict[str, str] = {}
            for record, prompt in zip(records[batch], prompts[batch], strict=True):
                try:
                    views[record.record_id] = self.generator.look(prompt, record.image_uri)
                except ImageError as error:
                    logger.warning("record %r is not answered: %s", record.record_id, error)
                    unseen[record.record_id] = error.reason
            seen = [pair for pair in zip(records[batch], prompts[batch], strict=True) if pair[0].record_id in views]
            answered = self._answer([record for record, _ in seen], [prompt for _, prompt in seen], [*views.values()])
            by_id = {row.record_id: row for row in answered} | {
                record_id: Prediction(record_id=record_id, method=self.asked.method, labels=[], text="", reason=reason)
                for record_id, reason in unseen.items()
            }
            rows += [by_id[record.record_id] for record in records[batch]]
        return rows

    def _answer(
        self, records: Sequence[Record], prompts: Sequence[list[Message]], views: Sequence[View] | None = None
    ) -> list[Prediction]:
        ask = self._rank if self.asked.mode == "rank" else self._write
        return ask(records, prompts, views)

    def _write(
        self, records: Sequence[Record], prompts: Sequence[list[Message]], views: Sequence[View] | None
    ) -> list[Prediction]:
        constrained = self.asked.mode == "constrained"
        ask = self.generator.choose if constrained else self.generator.generate
        texts = ask(prompts, views)
        rows = []
        for record, text in zip(records, texts, strict=True):
            read = self.task.parse(text)
            if constrained and (len(read.labels) != self.asked.length or not all(read.labels)):
                raise UserError(f"record {record.record_id!r}: the constrained answer {text!r} cannot be read back")
            rows.append(
                Prediction(
                    record_id=record.record_id,
                    method=self.asked.method,
                    labels=read.labels,
                    text=text,
                    reason=read.reason,
                )
            )
        return rows

    def _rank(
        self, records: Sequence[Record], prompts: Sequence[list[Message]], views: Sequence[View] | None
    ) -> list[Prediction]:
        rows = []
        for record, scores in zip(records, self.generator.rank(prompts, views), strict=True):
            probabilities = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
            order = sorted(range(len(scores)), key=lambda index: -scores[index])
            rows.append(
                Prediction(
                    record_id=record.record_id,
                    method=self.asked.method,
                    labels=[self.label_ids[index] for index in order],
                    text="",
                    scores=[probabilities[index] for index in order],
                )
            )
        return rows


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
