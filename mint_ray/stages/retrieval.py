"""Look up passages for the test records, and decide which of them a student is shown ahead of each note."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from transformers import AutoConfig

from mint_ray import storage
from mint_ray.artifacts import Artifact, open_artifact
from mint_ray.layouts import Example, Layout
from mint_ray.layouts.choice import choose_layout
from mint_ray.loading import UserError, dump
from mint_ray.records import Label, Message, Record, from_table, schema_of, to_table
from mint_ray.retrievers import Document, Retriever, build_retriever
from mint_ray.retrievers.adaptive import confidence, keep_rising
from mint_ray.retrievers.config import Retrieval
from mint_ray.retrievers.documents import document_inputs, read_documents
from mint_ray.retrievers.passages import fit_words, put_ahead, write_passages
from mint_ray.stages.config import Evaluate
from mint_ray.stages.session import map_rows
from mint_ray.students import load_model, load_tokenizer, resolve_path, student_revision
from mint_ray.students.config import Student
from mint_ray.tasks import build_task
from mint_ray.tasks.config import AnyTask
from mint_ray.telemetry import Progress

logger = logging.getLogger("mint_ray")

NAMES_PER_PASS = 256
"""Most labels behind one prompt in one forward pass; a fixed cut, so that a record's passages depend on it alone."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """What is searched with: the note, and nothing else of the record."""

    record_id: str
    note: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Retrieved:
    """The documents found for one record, best first."""

    record_id: str
    document_ids: list[str]
    scores: list[float]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shelf:
    """What a student could be shown with one prompt, best first."""

    record_id: str
    prompt: list[Message]
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
    """Table `retrieved`: the documents nearest to each test record's note, whoever is to read them."""
    retrieval = _chosen(config)
    inputs = {
        "records": records.name,
        "documents": documents.name,
        **build_retriever(retrieval.retriever).inputs(),
    }
    settings = {"retriever": dump(retrieval)["retriever"], "passages": retrieval.passages, "task": dump(task)}
    artifact = open_artifact(root, "retrieve", settings, inputs)
    if artifact.is_complete:
        return artifact
    asked = build_task(task, records.rows(Label, "labels"), length)
    with artifact.write() as draft:
        held_out = _held_out(records)
        queries = [Query(record_id=record.record_id, note=asked.note(record)) for record in held_out]
        # one worker, on the processor for a search by words: what takes time is the index, and each would build its own
        gpus = config.resources.gpus_per_actor if retrieval.retriever.kind == "dense" else 0
        resources = dataclasses.replace(config.resources, actors=1, gpus_per_actor=gpus)
        progress = Progress("retrieve", len(queries), "records")
        rows: list[Retrieved] = []
        table = to_table(queries, Query)
        for batch in map_rows(table, RetrieverActor, (retrieval, documents), resources, progress):
            rows += from_table(Retrieved, batch.cast(schema_of(Retrieved)))
        draft.counts["records"] = draft.write_rows(Retrieved, "retrieved", rows)
        draft.counts["records_without_any"] = sum(not row.document_ids for row in rows)
        found = {row.record_id: row.document_ids for row in rows}
        draft.metrics.update(measure_recall(held_out, documents.rows(Document, "documents"), found))
    logger.info("retrieve: %s, %s", retrieval.retriever.kind, draft.metrics)
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
    """Table `passages`: what stands ahead of each test record's note for one student, cut to fit into its context.

    Base and aligned student share it, unless each chooses for itself (`adaptive`).
    """
    retrieval = _chosen(config)
    documents = gather_documents(root, retrieval, records)
    retrieved = retrieve_documents(root, config, task, length, records, documents)
    inputs = {"records": records.name, "retrieved": retrieved.name, "student": student_revision(student)}
    if retrieval.adaptive and adapter is not None:
        inputs["student"] = adapter.name
    settings = {
        "retrieval": dump(retrieval),
        "student": {"model_id": student.model_id, "revision": student.revision, "dtype": student.dtype},
        "max_new_tokens": config.generation.max_new_tokens,
        "task": dump(task),
        "length": length,
    }
    artifact = open_artifact(root, "passages", settings, inputs)
    if artifact.is_complete:
        return artifact
    labels = records.rows(Label, "labels")
    asked = build_task(task, labels, length)
    with artifact.write() as draft:
        held_out = _held_out(records)
        by_id = {document.document_id: document for document in documents.rows(Document, "documents")}
        found = {row.record_id: row for row in retrieved.rows(Retrieved, "retrieved")}
        shelves = [
            Shelf(
                record_id=record.record_id,
                prompt=asked.prompt(record),
                documents=[by_id[document_id] for document_id in found[record.record_id].document_ids],
                scores=found[record.record_id].scores,
            )
            for record in held_out
        ]
        # one label at a time: the first line of an answer that names it
        answers = [asked.answer([label.label_id]) for label in labels] if retrieval.adaptive else []
        resources = config.resources if answers else dataclasses.replace(config.resources, gpus_per_actor=0)
        progress = Progress("choose passages", len(shelves), "records")
        arguments = (student, config, adapter if answers else None, answers)
        rows: list[Passages] = []
        for batch in map_rows(to_table(shelves, Shelf), PassageActor, arguments, resources, progress):
            rows += from_table(Passages, batch.cast(schema_of(Passages)))
        draft.counts["records"] = draft.write_rows(Passages, "passages", rows)
        draft.counts["passages"] = sum(len(row.document_ids) for row in rows)
        draft.counts["passages_left_out"] = sum(len(row.left_out) for row in rows)
        draft.counts["records_with_passages_cut"] = sum(row.cut for row in rows)
        draft.metrics["retrieved"] = retrieved.manifest.metrics
        shown = {row.record_id: row.document_ids for row in rows}
        draft.metrics["shown"] = measure_recall(held_out, list(by_id.values()), shown)
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
    """Holds the index of all documents and answers queries."""

    def __init__(self, config: Retrieval, documents: Artifact) -> None:
        self.passages = config.passages
        self.retriever: Retriever = build_retriever(config.retriever)
        self.retriever.index(documents.rows(Document, "documents"))

    def __call__(self, batch: pa.Table) -> pa.Table:
        queries = from_table(Query, batch.cast(schema_of(Query)))
        found = self.retriever.search([query.note for query in queries], self.passages)
        rows = [
            Retrieved(
                record_id=query.record_id,
                document_ids=[hit.document_id for hit in hits],
                scores=[hit.score for hit in hits],
            )
            for query, hits in zip(queries, found, strict=True)
        ]
        return to_table(rows, Retrieved)


class PassageActor:
    """Holds a student's tokenizer, and the student if it is to choose for itself, and sets out records' passages."""

    def __init__(self, student: Student, config: Evaluate, adapter: Artifact | None, answers: list[str]) -> None:
        """`answers` are what naming each label begins with; none if the student has no choice."""
        torch.set_num_threads(max(1, int(config.resources.cpus_per_actor)))
        self.retrieval = _chosen(config)
        self.tokenizer = load_tokenizer(student)
        self.answers = [list(self.tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers]
        self.room = max([config.generation.max_new_tokens, *map(len, self.answers)])
        self.model: Any = None
        if answers:
            with tempfile.TemporaryDirectory() as folder:
                if adapter is not None:
                    storage.download_folder(adapter.file_uri("adapter"), folder)
                model = load_model(student, adapter=Path(folder) if adapter else None)
            self.model = model.to("cuda" if torch.cuda.is_available() else "cpu")
            self.layout = self._choose_layout()
        self.max_tokens = self._max_tokens(student)

    def __call__(self, batch: pa.Table) -> pa.Table:
        shelves = from_table(Shelf, batch.cast(schema_of(Shelf)))
        # one at a time: a record's passages depend on it alone
        return to_table([self.choose(shelf) for shelf in shelves], Passages)

    def choose(self, shelf: Shelf) -> Passages:
        most = self.retrieval.max_passage_words
        fitting = fit_words(shelf.prompt, shelf.documents, most, self.max_tokens, self._count)
        candidates = list(range(len(fitting)))
        tried: list[float] = []
        if self.model is not None:

            def confidence_with(passages: list[int]) -> float:
                return confidence(self._score(shelf, passages, fitting))

            candidates, tried = keep_rising(candidates, confidence_with)
        ids = [document.document_id for document in shelf.documents]
        whole = [min(len(document.text.split()), most) for document in shelf.documents]
        return Passages(
            record_id=shelf.record_id,
            document_ids=[ids[i] for i in candidates],
            scores=[shelf.scores[i] for i in candidates],
            words=[fitting[i] for i in candidates],
            left_out=[document_id for i, document_id in enumerate(ids) if i not in candidates],
            cut=fitting != whole,
            confidence=tried,
            text=_write(shelf, candidates, fitting),
        )

    @torch.inference_mode()
    def _score(self, shelf: Shelf, passages: list[int], words: list[int]) -> list[float]:
        """Log-probability of the answer's beginning that names each label, behind the prompt with these passages."""
        prompt_ids = self._encode(put_ahead(shelf.prompt, _write(shelf, passages, words)))
        logps: list[float] = []
        for start in range(0, len(self.answers), NAMES_PER_PASS):
            completions = self.answers[start : start + NAMES_PER_PASS]
            example = Example(record_id=shelf.record_id, prompt_ids=prompt_ids, completions=completions, pairs=[])
            batch = self.layout.lay_out([example], score_prompt=False)
            batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
            logps += self.layout.run(self.model, batch).sums_C.tolist()
        return logps

    def _choose_layout(self) -> Layout:
        # tried on what every worker has alike, not on the record that happens to come first
        prompt_ids = self._encode([Message(role="user", content="Which of these is the most likely?")])
        probe = Example(record_id="probe", prompt_ids=prompt_ids, completions=self.answers[:4], pairs=[])
        return choose_layout(self.model, [probe])

    def _max_tokens(self, student: Student) -> int:
        """Longest prompt: as the settings have it, or what the context leaves beside the answer."""
        limit = self.retrieval.max_prompt_tokens
        config = AutoConfig.from_pretrained(resolve_path(student), revision=student.revision, trust_remote_code=False)
        context: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        if context is None:
            if limit is None:
                raise UserError(
                    f"evaluate.retrieval.max_prompt_tokens: {student.model_id} does not say how long its context is; "
                    "give the longest prompt"
                )
            return limit
        return min(limit or context, context - self.room)

    def _encode(self, prompt: Sequence[Message]) -> list[int]:
        messages = [dataclasses.asdict(message) for message in prompt]
        ids: list[int] = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        return ids

    def _count(self, prompt: Sequence[Message]) -> int:
        return len(self._encode(prompt))


def _write(shelf: Shelf, passages: Sequence[int], words: Sequence[int]) -> str:
    return write_passages([shelf.documents[i] for i in passages], [words[i] for i in passages])


def _chosen(config: Evaluate) -> Retrieval:
    if config.retrieval is None:
        raise ValueError("evaluate.retrieval is not set")
    return config.retrieval


def _held_out(records: Artifact) -> list[Record]:
    return [record for record in records.rows(Record, "records") if record.split == "test"]
