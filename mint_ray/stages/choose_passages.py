"""Choose the passages that a student reads ahead of each note, truncated to fit its prompt."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from mint_ray import lineage, storage
from mint_ray.artifacts import Artifact, PartResult, read_part
from mint_ray.config.loader import UserError
from mint_ray.config.stages import Evaluate
from mint_ray.lineage import AnswerRequest, resolve_student, retrieval_of
from mint_ray.models.architectures import load_config
from mint_ray.models.pretrained import resolve_model
from mint_ray.records import Label, Message, Record, from_table
from mint_ray.retrievers import Document
from mint_ray.retrievers.adaptive import confidence, select_passages
from mint_ray.retrievers.passages import (
    ChosenPassages,
    Retrieved,
    allocate_words,
    format_passages,
    measure_recall,
    prepend_passages,
)
from mint_ray.runtime.map_parts import Part, Workers, map_parts
from mint_ray.students.config import Generation, Student
from mint_ray.students.constrained_decoding import AllowedAnswers
from mint_ray.students.generation import StudentGenerator
from mint_ray.students.loading import load_tokenizer
from mint_ray.tasks import build_task
from mint_ray.telemetry import Progress


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RetrievedPart(Part):
    """One part of the retrieved documents (`uri`), and that of their records: the work of one task."""

    records_uri: str


def choose_passages(
    root: str, config: Evaluate, request: AnswerRequest, records: Artifact, retrieved: Artifact
) -> Artifact:
    """Write table `passages` of `ChosenPassages`, one row per record of the split.

    Raises UserError if the student's config does not state its context length and `max_prompt_tokens` is not set.
    """
    artifact = lineage.choose_passages(root, config, request, records, retrieved)
    if artifact.is_complete:
        return artifact
    retrieval, resources = retrieval_of(config), config.resources
    parts = [
        RetrievedPart(
            path=file.path.replace("retrieved/", "passages/", 1),
            uri=retrieved.file_uri(file.path),
            records_uri=records.file_uri(file.path.replace("retrieved/", "records/", 1)),
        )
        for file in retrieved.table_files("retrieved")
    ]
    labels = records.rows(Label, "labels")
    progress = Progress("choose_passages", records.manifest.counts[f"records_{config.split}"], "records")
    workers = Workers(
        worker=PassageActor,
        arguments=(artifact, config, request, labels),
        actors=(resources.actors, resources.actors),
        cpus=resources.cpus_per_actor,
        gpus=resources.gpus_per_actor if retrieval.adaptive else 0,
    )
    with artifact.write() as draft:
        for part in map_parts(artifact, parts, PartResult, workers):
            progress.advance(part.rows)
            draft.add_part(part)
        rows = [row for part in parts for row in from_table(ChosenPassages, read_part(artifact.file_uri(part.path)))]
        draft.counts["passages"] = sum(len(row.document_ids) for row in rows)
        draft.counts["documents_skipped"] = sum(len(row.skipped) for row in rows)
        draft.counts["records_with_truncated_passages"] = sum(row.truncated for row in rows)
        held_out = [record for record in records.rows(Record, "records") if record.split == config.split]
        chosen = {row.record_id: row.document_ids for row in rows}
        draft.metrics["retrieved"] = retrieved.manifest.metrics
        draft.metrics["shown"] = measure_recall(held_out, retrieved.rows(Document, "documents"), chosen)
    return artifact


class PassageActor:
    """Actor that chooses the passages of one part of the records at a time; adaptive retrieval needs the student."""

    def __init__(self, artifact: Artifact, config: Evaluate, request: AnswerRequest, labels: Sequence[Label]) -> None:
        torch.set_num_threads(max(1, int(config.resources.cpus_per_actor)))
        self.artifact, self.request, self.split = artifact, request, config.split
        self.task = build_task(request.task, labels, request.num_labels)
        self.retrieval = retrieval_of(config)
        student = resolve_student(request.student, request.built)
        self.tokenizer = load_tokenizer(student)
        self.max_tokens = self._max_tokens(student, config.generation)
        self.generator = self._build_generator(student) if self.retrieval.adaptive else None

    def work(self, part: RetrievedPart) -> PartResult:
        """Choose and write the passages of one part."""
        found = {row.record_id: row for row in from_table(Retrieved, read_part(part.uri))}
        records = [record for record in from_table(Record, read_part(part.records_uri)) if record.split == self.split]
        # one at a time: a record's passages depend on it alone
        rows = [self.choose(self.task.prompt(record), found[record.record_id]) for record in records]
        file, rows = self.artifact.write_part_once(part.path, ChosenPassages, rows)
        return PartResult(path=part.path, rows=len(rows), files=[file], counts={"records": len(rows)})

    def choose(self, prompt: list[Message], found: Retrieved) -> ChosenPassages:
        """Return the passages of one record, of those that were retrieved; the true label is not used."""
        documents, max_words = found.documents, self.retrieval.max_passage_words
        words = allocate_words(prompt, documents, max_words, self.max_tokens, self._count)

        def write(shown: Sequence[int]) -> str:
            return format_passages([documents[i] for i in shown], [words[i] for i in shown])

        shown = list(range(len(words)))
        tried: list[float] = []
        if self.generator is not None:
            generator = self.generator

            def confidence_with(passages: list[int]) -> float:
                return confidence(generator.rank([prepend_passages(prompt, write(passages))])[0])

            shown, tried = select_passages(shown, confidence_with)
        return ChosenPassages(
            record_id=found.record_id,
            document_ids=[documents[i].document_id for i in shown],
            scores=[found.scores[i] for i in shown],
            words=[words[i] for i in shown],
            skipped=[document.document_id for i, document in enumerate(documents) if i not in shown],
            truncated=words != [min(len(document.text.split()), max_words) for document in documents],
            confidence=tried,
            text=write(shown),
        )

    def _build_generator(self, student: Student) -> StudentGenerator:
        label_ids = tuple(label.label_id for label in self.task.labels)
        answers = AllowedAnswers(labels=label_ids, length=self.request.num_labels, to_text=self.task.answer)
        adapter = self.request.adapter
        with tempfile.TemporaryDirectory() as folder:
            if adapter is not None:
                storage.download_folder(adapter.file_uri("adapter"), folder)
            # sums over a name's tokens are log-probabilities of the names, also if answers are normalized otherwise
            settings = Generation(length_normalization="sum")
            return StudentGenerator(student, settings, Path(folder) if adapter else None, answers=answers)

    def _max_tokens(self, student: Student, generation: Generation) -> int:
        """Return the maximum number of tokens of a prompt: the setting, or less so that the answer fits the context.

        Raises UserError if neither the setting nor the context length is known.
        """
        limit = self.retrieval.max_prompt_tokens
        config = load_config(resolve_model(student, "student"))
        context: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        if context is None:
            if limit is None:
                raise UserError(
                    f"evaluate.retrieval.max_prompt_tokens: {student.model_id} does not state its context length; set "
                    "the maximum length of a prompt"
                )
            return limit
        # enough for every mode: the longest names that a list can have, and the end-of-sequence token
        names = sorted(self.task.labels, key=lambda label: -len(label.name))[: self.request.num_labels]
        answer = self.tokenizer(self.task.answer([label.label_id for label in names]), add_special_tokens=False)
        available = context - max(generation.max_new_tokens, len(answer["input_ids"]) + 1)
        return available if limit is None else min(limit, available)

    def _count(self, prompt: Sequence[Message]) -> int:
        messages = [dataclasses.asdict(message) for message in prompt]
        return len(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
