"""Students on workers: actors that answer prompts, or rank labels, for parts of the records.

Shared by the stages `answer` and `rank`. Tested by tests/stages/test_answer.py and tests/stages/test_rank.py.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from mint_ray import storage
from mint_ray.artifacts import Artifact, Draft, PartResult, read_part
from mint_ray.config.loader import UserError
from mint_ray.config.stages import EvaluateResources
from mint_ray.images import ImageError, read_images_ahead
from mint_ray.lineage import AnswerRequest, resolve_student
from mint_ray.models.vision_processor import FRAME, ProcessedImage
from mint_ray.records import Label, Message, Prediction, Record, from_table
from mint_ray.retrievers.passages import ChosenPassages, prepend_passages
from mint_ray.runtime.map_parts import Part, actor_pool, map_parts
from mint_ray.students.constrained_decoding import AllowedAnswers
from mint_ray.students.generation import StudentGenerator
from mint_ray.tasks import Task, build_task
from mint_ray.telemetry import Progress

logger = logging.getLogger("mint_ray")

Case = tuple[Record, list[Message]]
"""A record and its prompt."""
RECORDS_PER_PART = 256
"""Records, of any split, that are read for one part of the answers. A constant: parts that are finished must mean the
same to the run that resumes them."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RecordsRange(Part):
    """Rows of one part of the records: the work of one task."""

    start: int
    """First row."""


def answer_parts(
    artifact: Artifact, request: AnswerRequest, resources: EvaluateResources, records: Artifact, draft: Draft
) -> None:
    """Write table `answers` of a request into `artifact`, part by part, by workers that each load the student.

    Raises UserError, before any work, for a label that a constrained answer cannot name.
    """
    labels = records.rows(Label, "labels")
    if request.mode == "constrained":
        check_names(build_task(request.task, labels, request.num_labels))
    ranges = [
        RecordsRange(
            path=f"answers/{file.path.removeprefix('records/').removesuffix('.parquet')}-{number:03d}.parquet",
            uri=records.file_uri(file.path),
            start=start,
        )
        for file in records.table_files("records")
        for number, start in enumerate(range(0, max(file.rows or 0, 1), RECORDS_PER_PART))
    ]
    counts = records.manifest.counts
    total = sum(counts[f"records_{split}"] for split in request.splits)
    progress = Progress(f"{artifact.stage} ({request.method.title})", total, "records")
    workers = actor_pool(StudentActor, (artifact, request, labels, resources), resources)
    for part in map_parts(artifact, ranges, PartResult, workers):
        progress.advance(part.counts["answers"])
        draft.add_part(part)


def check_names(task: Task) -> None:
    """Raise UserError if the task cannot parse the name of a label from the answer that it writes for it."""
    for label in task.labels:
        text = task.answer([label.label_id])
        if task.parse(text).labels != [label.label_id]:
            raise UserError(
                f"evaluate.generation.modes: constrained: label {label.label_id!r} ({label.name!r}) cannot be "
                f"parsed from {text!r}"
            )


class StudentActor:
    """Answers the prompts, or ranks the labels, of one part of the records at a time with the student it loads."""

    def __init__(
        self, artifact: Artifact, request: AnswerRequest, labels: Sequence[Label], resources: EvaluateResources
    ) -> None:
        torch.set_num_threads(max(1, int(resources.cpus_per_actor)))
        self.artifact, self.request = artifact, request
        self.task = build_task(request.task, labels, request.num_labels)
        self.label_ids = [label.label_id for label in labels]
        self.folder = tempfile.TemporaryDirectory()
        if request.adapter is not None:
            storage.download_folder(request.adapter.file_uri("adapter"), self.folder.name)
        rows = request.passages.rows(ChosenPassages, "passages") if request.passages else []
        self.passages = {row.record_id: row.text for row in rows}
        answers = AllowedAnswers(labels=tuple(self.label_ids), length=request.num_labels, to_text=self.task.answer)
        self.generator = StudentGenerator(
            resolve_student(request.student, request.built),
            request.generation,
            Path(self.folder.name) if request.adapter else None,
            answers=None if request.mode == "free" else answers,
            batch_size=resources.batch_size,
        )
        self.batch_size = resources.batch_size
        self.columns = dataclasses.asdict(request.method)

    def work(self, part: RecordsRange) -> PartResult:
        """Answer and write one part."""
        table = read_part(part.uri).slice(part.start, RECORDS_PER_PART)
        records = from_table(Record, table.filter(pc.is_in(table["split"], value_set=pa.array(self.request.splits))))
        prompts = [self.task.prompt(record) for record in records]
        if self.request.passages:
            prompts = [
                prepend_passages(prompt, self.passages[record.record_id])
                for record, prompt in zip(records, prompts, strict=True)
            ]
        cases = list(zip(records, prompts, strict=True))
        rows = self._answer_images(cases) if self.task.show_image else self._answer(cases, None)
        file, rows = self.artifact.write_part_once(part.path, Prediction, rows)
        dropped = Counter(row.reason for row in rows if row.reason)
        counts = {"answers": len(rows)}
        return PartResult(path=part.path, rows=len(table), files=[file], counts=counts, dropped=dict(dropped))

    def _answer_images(self, cases: Sequence[Case]) -> list[Prediction]:
        """Answer prompts with images, which are decoded ahead of the batch; an unreadable image is not answered."""
        rows: list[Prediction] = []
        decoded = read_images_ahead(cases, FRAME, lambda case: case[0].image_uri)
        while batch := list(islice(decoded, self.batch_size)):
            images: dict[str, ProcessedImage] = {}
            failed: dict[str, Prediction] = {}
            for (record, prompt), pixels in batch:
                try:
                    image = self.generator.process_image(prompt, pixels, record.image_uri or "")
                    images[record.record_id] = image
                except ImageError as error:
                    logger.warning("record %r is not answered: %s", record.record_id, error)
                    failed[record.record_id] = self._prediction(record, reason=error.reason)
            readable = [case for case, _ in batch if case[0].record_id in images]
            answered = {row.record_id: row for row in self._answer(readable, list(images.values()))} | failed
            rows += [answered[record.record_id] for (record, _), _ in batch]
        return rows

    def _answer(self, cases: Sequence[Case], images: Sequence[ProcessedImage] | None) -> list[Prediction]:
        prompts = [prompt for _, prompt in cases]
        if self.request.mode == "rank":
            rankings = self.generator.rank(prompts, images)
            return [self._ranking(record, scores) for (record, _), scores in zip(cases, rankings, strict=True)]
        is_constrained = self.request.mode == "constrained"
        generate = self.generator.generate_constrained if is_constrained else self.generator.generate
        return [self._parse(record, text) for (record, _), text in zip(cases, generate(prompts, images), strict=True)]

    def _parse(self, record: Record, text: str) -> Prediction:
        parsed = self.task.parse(text)
        is_complete = len(parsed.labels) == self.request.num_labels and all(parsed.labels)
        if self.request.mode == "constrained" and not is_complete:
            raise UserError(f"record {record.record_id!r}: the constrained answer {text!r} cannot be parsed")
        return self._prediction(record, labels=parsed.labels, text=text, reason=parsed.reason)

    def _ranking(self, record: Record, scores: Sequence[float]) -> Prediction:
        probabilities = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
        order = sorted(range(len(scores)), key=lambda index: -scores[index])
        labels = [self.label_ids[index] for index in order]
        return self._prediction(record, labels=labels, scores=[probabilities[index] for index in order])

    def _prediction(self, record: Record, **values: Any) -> Prediction:
        return Prediction(record_id=record.record_id, **self.columns, **({"labels": [], "text": ""} | values))
