"""Search documents for each held-out record, with its note as the query."""

from __future__ import annotations

from collections.abc import Sequence

from mint_ray import lineage
from mint_ray.artifacts import Artifact, PartResult, read_part
from mint_ray.config.loader import UserError
from mint_ray.config.stages import Evaluate
from mint_ray.lineage import retrieval_of
from mint_ray.records import Label, Record, from_table
from mint_ray.retrievers import Document, build_retriever
from mint_ray.retrievers.config import Retrieval
from mint_ray.retrievers.documents import document_inputs, read_documents
from mint_ray.retrievers.passages import Retrieved, measure_recall
from mint_ray.runtime.map_parts import Part, Workers, map_parts
from mint_ray.tasks import build_task
from mint_ray.tasks.config import AnyTask
from mint_ray.telemetry import Progress


def check_retrieval(config: Retrieval) -> None:
    """Raise UserError if documents or encoder are missing, before any work."""
    try:
        document_inputs(config.documents)
        build_retriever(config.retriever).inputs()
    except UserError as error:
        raise UserError(f"evaluate.retrieval: {error}") from error


def retrieve_documents(root: str, config: Evaluate, task: AnyTask, records: Artifact) -> Artifact:
    """Write tables `documents` and `retrieved` (the nearest documents of each record of the split, best first).

    Annotations that cite a held-out publication are not in the documents, and are counted.
    """
    artifact = lineage.retrieve(root, config, task, records)
    if artifact.is_complete:
        return artifact
    retrieval, resources = retrieval_of(config), config.resources
    labels, rows = records.rows(Label, "labels"), records.rows(Record, "records")
    corpus = read_documents(retrieval.documents, labels, rows)
    parts = [
        Part(path=file.path.replace("records/", "retrieved/", 1), uri=records.file_uri(file.path))
        for file in records.table_files("records")
    ]
    progress = Progress("retrieve", records.manifest.counts[f"records_{config.split}"], "records")
    with artifact.write() as draft:
        draft.counts["documents"] = draft.write_rows(Document, "documents", corpus.documents)
        draft.dropped.update(corpus.dropped)
        workers = Workers(
            worker=RetrieverActor,
            arguments=(artifact, config, task, labels, corpus.documents),
            # one actor: most of the time goes into the index, and each actor would build its own
            actors=(1, 1),
            cpus=resources.cpus_per_actor,
            gpus=resources.gpus_per_actor if retrieval.retriever.kind == "dense" else 0,
        )
        for part in map_parts(artifact, parts, PartResult, workers):
            progress.advance(part.rows)
            draft.add_part(part)
        found = {
            row.record_id: [document.document_id for document in row.documents]
            for part in parts
            for row in from_table(Retrieved, read_part(artifact.file_uri(part.path)))
        }
        draft.counts["records_without_documents"] = sum(not ids for ids in found.values())
        held_out = [record for record in rows if record.split == config.split]
        draft.metrics.update(measure_recall(held_out, corpus.documents, found))
    return artifact


class RetrieverActor:
    """Actor that searches an index of all documents for one part of the records at a time."""

    def __init__(
        self,
        artifact: Artifact,
        config: Evaluate,
        task: AnyTask,
        labels: Sequence[Label],
        documents: Sequence[Document],
    ) -> None:
        retrieval = retrieval_of(config)
        self.artifact, self.passages, self.split = artifact, retrieval.max_passages, config.split
        self.task = build_task(task, labels, 1)
        self.documents = {document.document_id: document for document in documents}
        self.retriever = build_retriever(retrieval.retriever)
        self.retriever.index(documents)

    def work(self, part: Part) -> PartResult:
        """Search for the records of one part and write what was found."""
        records = [record for record in from_table(Record, read_part(part.uri)) if record.split == self.split]
        rows = self.search([record.record_id for record in records], [self.task.note(record) for record in records])
        file, rows = self.artifact.write_part_once(part.path, Retrieved, rows)
        return PartResult(path=part.path, rows=len(rows), files=[file], counts={"records": len(rows)})

    def search(self, record_ids: Sequence[str], notes: Sequence[str]) -> list[Retrieved]:
        """Return the documents of each record; the note alone is the query."""
        return [
            Retrieved(
                record_id=record_id,
                documents=[self.documents[hit.document_id] for hit in hits],
                scores=[hit.score for hit in hits],
            )
            for record_id, hits in zip(record_ids, self.retriever.search(notes, self.passages), strict=True)
        ]
