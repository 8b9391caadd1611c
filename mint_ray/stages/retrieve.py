"""Look up passages for the test records, and decide which of them a student is shown ahead of each note."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoConfig

from mint_ray import storage
from mint_ray.artifacts import Artifact, File, open_artifact, read_part
from mint_ray.config.loader import UserError, dump
from mint_ray.config.stages import Evaluate
from mint_ray.records import Label, Message, Record, Split, from_table
from mint_ray.retrievers import Document, build_retriever
from mint_ray.retrievers.adaptive import confidence, keep_rising
from mint_ray.retrievers.config import Retrieval
from mint_ray.retrievers.documents import document_inputs, read_documents
from mint_ray.retrievers.passages import fit_words, put_ahead, write_passages
from mint_ray.runtime.map_parts import map_parts
from mint_ray.students import Answers, StudentGenerator, load_tokenizer, resolve_path, student_revision
from mint_ray.students.config import Generation, Student
from mint_ray.tasks import build_task
from mint_ray.tasks.config import AnyTask
from mint_ray.telemetry import Progress

logger = logging.getLogger("mint_ray")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RecordsPart:
    """A part of the records: the work of one task."""

    path: str
    """Of the part that is written."""
    uri: str
    """Of the part of the records that is read."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WrittenPart:
    """What a task wrote."""

    path: str
    records: int
    files: list[File]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Retrieved:
    """The documents found for one record, best first."""

    record_id: str
    documents: list[Document]
    scores: list[float]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Passages:
    """What one student is shown ahead of one record's note."""

    record_id: str
    document_ids: list[str]
    """Of the passages shown, in order."""
    scores: list[float]
    """The retriever's score of each."""
    words: list[int]
    """Words shown of each."""
    left_out: list[str]
    """Documents that were found and are not shown: no room, or the student was not surer with them."""
    cut: bool
    """Whether the prompt's length cost a passage words that `max_passage_words` had left it."""
    confidence: list[float]
    """Adaptive: the student's confidence with none, and with each passage tried (`retrievers.adaptive`)."""
    text: str
    """What stands ahead of the prompt's last message, word for word; empty if nothing is shown."""


def check_retrieval(config: Retrieval) -> None:
    """Raise UserError if documents or encoder are missing, before any work."""
    try:
        document_inputs(config.documents)
        build_retriever(config.retriever).inputs()
    except UserError as error:
        raise UserError(f"evaluate.retrieval: {error}") from error


def gather_documents(root: str, config: Retrieval, records: Artifact) -> Artifact:
    """Table `documents`; annotations that cite a held-out publication are left out, and counted."""
    inputs = {"records": records.name, **document_inputs(config.documents)}
    artifact = open_artifact(root, "documents", {"documents": dump(config.documents)}, inputs)
    if artifact.is_complete:
        return artifact
    with artifact.write() as draft:
        library = read_documents(config.documents, records.rows(Label, "labels"), records.rows(Record, "records"))
        draft.counts["documents"] = draft.write_rows(Document, "documents", library.documents)
        draft.dropped.update(library.dropped)
    return artifact


def retrieve_documents(
    root: str, config: Evaluate, task: AnyTask, length: int, records: Artifact, documents: Artifact
) -> Artifact:
    """Table `retrieved`: the documents nearest to the note of each record of the split, whoever is to read them."""
    retrieval, resources = _chosen(config), config.resources
    retriever = build_retriever(retrieval.retriever)
    inputs = {"records": records.name, "documents": documents.name, **retriever.inputs()}
    settings = {
        "retriever": dump(retrieval)["retriever"],
        "passages": retrieval.passages,
        "split": config.split,
        "task": dump(task),
    }
    artifact = open_artifact(root, "retrieve", settings, inputs)
    if artifact.is_complete:
        return artifact
    parts = _parts(records, "retrieved")
    progress = Progress("retrieve", records.manifest.counts[f"records_{config.split}"], "records")
    with artifact.write() as draft:
        for part in map_parts(
            artifact,
            parts,
            WrittenPart,
            RetrieverActor,
            (artifact, config, task, records.rows(Label, "labels"), length, documents),
            # one: what takes time is the index, and each would build its own
            actors=(1, 1),
            cpus=resources.cpus_per_actor,
            gpus=resources.gpus_per_actor if retrieval.retriever.kind == "dense" else 0,
        ):
            progress.advance(part.records)
            draft.placed += part.files
            draft.counts["records"] += part.records
        found = {
            row.record_id: [document.document_id for document in row.documents]
            for part in parts
            for row in from_table(Retrieved, read_part(artifact.file_uri(part.path)))
        }
        draft.counts["records_without_any"] = sum(not ids for ids in found.values())
        draft.metrics.update(
            measure_recall(_records_of(records, config.split), documents.rows(Document, "documents"), found)
        )
    logger.info("retrieve: %s, %s", retrieval.retriever.kind, artifact.manifest.metrics)
    return artifact


def choose_passages(
    root: str,
    config: Evaluate,
    task: AnyTask,
    length: int,
    records: Artifact,
    student: Student,
    adapter: Artifact | None,
) -> Artifact:
    """Table `passages`: what stands ahead of the note of each record of the split for one student, cut to fit.

    Base and aligned student share it, unless each chooses for itself (`adaptive`).
    """
    retrieval, resources = _chosen(config), config.resources
    documents = gather_documents(root, retrieval, records)
    retrieved = retrieve_documents(root, config, task, length, records, documents)
    inputs = {"records": records.name, "retrieved": retrieved.name, "student": student_revision(student)}
    if not retrieval.adaptive:
        adapter = None
    elif adapter is not None:
        inputs["student"] = adapter.name
    settings = {
        "retrieval": dump(retrieval),
        "student": {"model_id": student.model_id, "revision": student.revision, "dtype": student.dtype},
        "max_new_tokens": config.generation.max_new_tokens,
        "split": config.split,
        "task": dump(task),
        "length": length,
    }
    artifact = open_artifact(root, "passages", settings, inputs)
    if artifact.is_complete:
        return artifact
    parts = _parts(records, "passages")
    labels = records.rows(Label, "labels")
    progress = Progress("choose passages", records.manifest.counts[f"records_{config.split}"], "records")
    actors = min(resources.actors, len(parts))
    with artifact.write() as draft:
        for part in map_parts(
            artifact,
            parts,
            WrittenPart,
            PassageActor,
            (artifact, config, task, labels, length, retrieved, student, adapter),
            actors=(actors, actors),
            cpus=resources.cpus_per_actor,
            gpus=resources.gpus_per_actor if retrieval.adaptive else 0,
        ):
            progress.advance(part.records)
            draft.placed += part.files
            draft.counts["records"] += part.records
        rows = [row for part in parts for row in from_table(Passages, read_part(artifact.file_uri(part.path)))]
        draft.counts["passages"] = sum(len(row.document_ids) for row in rows)
        draft.counts["passages_left_out"] = sum(len(row.left_out) for row in rows)
        draft.counts["records_with_passages_cut"] = sum(row.cut for row in rows)
        shown = {row.record_id: row.document_ids for row in rows}
        draft.metrics["retrieved"] = retrieved.manifest.metrics
        draft.metrics["shown"] = measure_recall(
            _records_of(records, config.split), documents.rows(Document, "documents"), shown
        )
    return artifact


def measure_recall(
    records: Sequence[Record], documents: Sequence[Document], found: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Share of records with a document of their true label among those `found`, of those that have one at all.

    Nothing if no document says of which label it is, or no record's label has one. The one place where the truth is
    looked at, after all is chosen.
    """
    about = {document.document_id: document.label_id for document in documents}
    known = set(about.values()) - {None}
    judged = [record for record in records if record.label_id in known]
    if not judged:
        return {}
    hits = sum(any(about[i] == record.label_id for i in found[record.record_id]) for record in judged)
    return {"recall": round(hits / len(judged), 4), "records": len(judged)}


class RetrieverActor:
    """Holds the index of all documents and searches it with the notes of one part after the other."""

    def __init__(
        self,
        artifact: Artifact,
        config: Evaluate,
        task: AnyTask,
        labels: Sequence[Label],
        length: int,
        documents: Artifact,
    ) -> None:
        retrieval = _chosen(config)
        self.artifact, self.passages, self.split = artifact, retrieval.passages, config.split
        self.task = build_task(task, labels, length)
        rows = documents.rows(Document, "documents")
        self.documents = {document.document_id: document for document in rows}
        self.retriever = build_retriever(retrieval.retriever)
        self.retriever.index(rows)

    def work(self, part: RecordsPart) -> WrittenPart:
        records = _read_records(part.uri, self.split)
        rows = self.search([record.record_id for record in records], [self.task.note(record) for record in records])
        file, rows = self.artifact.write_part_once(part.path, Retrieved, rows)
        return WrittenPart(path=part.path, records=len(rows), files=[file])

    def search(self, record_ids: Sequence[str], notes: Sequence[str]) -> list[Retrieved]:
        """The note is all that is searched with."""
        return [
            Retrieved(
                record_id=record_id,
                documents=[self.documents[hit.document_id] for hit in hits],
                scores=[hit.score for hit in hits],
            )
            for record_id, hits in zip(record_ids, self.retriever.search(notes, self.passages), strict=True)
        ]


class PassageActor:
    """Holds a student's tokenizer, and the student if it is to choose for itself, and sets out records' passages."""

    def __init__(
        self,
        artifact: Artifact,
        config: Evaluate,
        task: AnyTask,
        labels: Sequence[Label],
        length: int,
        retrieved: Artifact,
        student: Student,
        adapter: Artifact | None,
    ) -> None:
        torch.set_num_threads(max(1, int(config.resources.cpus_per_actor)))
        self.artifact, self.retrieved, self.length, self.split = artifact, retrieved, length, config.split
        self.task = build_task(task, labels, length)
        self.retrieval = _chosen(config)
        self.tokenizer = load_tokenizer(student)
        self.max_tokens = self._max_tokens(student, config.generation)
        self.generator = self._build_generator(student, adapter) if self.retrieval.adaptive else None

    def work(self, part: RecordsPart) -> WrittenPart:
        path = part.path.replace("passages/", "retrieved/", 1)
        found = {row.record_id: row for row in from_table(Retrieved, read_part(self.retrieved.file_uri(path)))}
        records = _read_records(part.uri, self.split)
        # one at a time: a record's passages depend on it alone
        rows = [self.choose(self.task.prompt(record), found[record.record_id]) for record in records]
        file, rows = self.artifact.write_part_once(part.path, Passages, rows)
        return WrittenPart(path=part.path, records=len(rows), files=[file])

    def choose(self, prompt: list[Message], found: Retrieved) -> Passages:
        """Neither prompt nor documents tell which label is the record's own."""
        documents, most = found.documents, self.retrieval.max_passage_words
        words = fit_words(prompt, documents, most, self.max_tokens, self._count)

        def write(shown: Sequence[int]) -> str:
            return write_passages([documents[i] for i in shown], [words[i] for i in shown])

        shown = list(range(len(words)))
        tried: list[float] = []
        if self.generator is not None:
            generator = self.generator

            def confidence_with(passages: list[int]) -> float:
                return confidence(generator.rank([put_ahead(prompt, write(passages))])[0])

            shown, tried = keep_rising(shown, confidence_with)
        return Passages(
            record_id=found.record_id,
            document_ids=[documents[i].document_id for i in shown],
            scores=[found.scores[i] for i in shown],
            words=[words[i] for i in shown],
            left_out=[document.document_id for i, document in enumerate(documents) if i not in shown],
            cut=words != [min(len(document.text.split()), most) for document in documents],
            confidence=tried,
            text=write(shown),
        )

    def _build_generator(self, student: Student, adapter: Artifact | None) -> StudentGenerator:
        label_ids = tuple(label.label_id for label in self.task.labels)
        answers = Answers(labels=label_ids, length=self.length, write=self.task.answer)
        with tempfile.TemporaryDirectory() as folder:
            if adapter is not None:
                storage.download_folder(adapter.file_uri("adapter"), folder)
            # sums over a name's tokens: probabilities of the names, whatever the ranking of answers goes by
            settings = Generation(normalise="sum")
            return StudentGenerator(student, settings, Path(folder) if adapter else None, answers=answers)

    def _max_tokens(self, student: Student, generation: Generation) -> int:
        """Longest prompt: as the settings have it, or what the context leaves beside the answer.

        Raises UserError if neither says how long that is.
        """
        limit = self.retrieval.max_prompt_tokens
        path = resolve_path(student)
        config = AutoConfig.from_pretrained(path, revision=student.revision, trust_remote_code=False)
        context: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        if context is None:
            if limit is None:
                raise UserError(
                    f"evaluate.retrieval.max_prompt_tokens: {student.model_id} does not say how long its context is; "
                    "give the longest prompt"
                )
            return limit
        # whichever way it will answer: as many of the longest names as a list has, and the end
        names = sorted(self.task.labels, key=lambda label: -len(label.name))[: self.length]
        listed = self.tokenizer(self.task.answer([label.label_id for label in names]), add_special_tokens=False)
        room = context - max(generation.max_new_tokens, len(listed["input_ids"]) + 1)
        return room if limit is None else min(limit, room)

    def _count(self, prompt: Sequence[Message]) -> int:
        messages = [dataclasses.asdict(message) for message in prompt]
        return len(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])


def _parts(records: Artifact, table: str) -> list[RecordsPart]:
    return [
        RecordsPart(path=file.path.replace("records/", f"{table}/", 1), uri=records.file_uri(file.path))
        for file in records.table_files("records")
    ]


def _read_records(uri: str, split: Split) -> list[Record]:
    return [record for record in from_table(Record, read_part(uri)) if record.split == split]


def _records_of(records: Artifact, split: Split) -> list[Record]:
    return [record for record in records.rows(Record, "records") if record.split == split]


def _chosen(config: Evaluate) -> Retrieval:
    if config.retrieval is None:
        raise ValueError("evaluate.retrieval is not set")
    return config.retrieval
