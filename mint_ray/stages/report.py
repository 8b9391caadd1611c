"""Write the report of a run: one HTML page, Markdown, plain text and the resource accounting."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mint_ray import lineage, storage
from mint_ray.artifacts import Artifact
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.config.stages import Prepare
from mint_ray.metrics import count_label_hits, count_transitions, effective_k
from mint_ray.metrics.methods import read_methods
from mint_ray.records import Label, Method, Prediction, Record
from mint_ray.reports import (
    Example,
    LabelHits,
    MethodResult,
    RunSummary,
    render_html,
    render_markdown,
    render_terminal,
)
from mint_ray.runtime.goodput import measure_goodput
from mint_ray.sources.config import Hpo
from mint_ray.tasks import Task, build_task

PAGE, TABLE, MARKDOWN, GOODPUT = "report.html", "table.txt", "report.md", "goodput.json"
MAX_EXAMPLES = 4


def write_report(config: PipelineConfig, done: Mapping[str, Artifact]) -> Artifact:
    """Write `report.html`, `report.md`, `table.txt` and `goodput.json`.

    Args:
        config: The run.
        done: Outputs of every stage before the report, by step.
    """
    artifact = lineage.report(config.root, config.title, done)
    if artifact.is_complete:
        return artifact
    with artifact.write() as draft:
        summary = summarize_run(config, done)
        draft.write_text(PAGE, render_html(summary))
        draft.write_text(MARKDOWN, render_markdown(summary))
        draft.write_text(TABLE, render_terminal(summary))
        goodput = {stage: dataclasses.asdict(used) for stage, used in summary.goodput.items()}
        draft.write_text(GOODPUT, json.dumps(goodput, indent=1))
    return artifact


def summarize_run(config: PipelineConfig, done: Mapping[str, Artifact]) -> RunSummary:
    """Return everything that the report shows, from manifests, predictions and the training log."""
    source, evaluate = done["prepare"], done["evaluate"]
    records_artifact = done.get("match_texts", source)
    labels, top = source.rows(Label, "labels"), config.pair.sampler.top
    task = build_task(config.task, labels, top)
    records = {
        row.record_id: row for row in records_artifact.rows(Record, "records") if row.split == config.evaluate.split
    }
    truth = {record_id: row.label_id or "" for record_id, row in records.items()}
    name = {label.label_id: label.name for label in labels}
    predictions = evaluate.rows(Prediction, "predictions")
    base = [row for row in predictions if row.method == Method(student="base")]
    aligned = [row for row in predictions if row.method == Method(student="aligned")]
    k = effective_k(top)
    before, after = count_label_hits(base, truth, k), count_label_hits(aligned, truth, k)
    return RunSummary(
        title=config.title,
        methods=[
            MethodResult(method=method, estimates=estimates)
            for method, estimates in read_methods(evaluate.manifest.metrics).items()
        ],
        confidence=config.evaluate.confidence,
        counts={stage: dict(artifact.manifest.counts) for stage, artifact in done.items()},
        dropped={stage: artifact.manifest.dropped for stage, artifact in done.items() if artifact.manifest.dropped},
        log_history=read_outcome(done["train"])["log_history"],
        per_label=[
            LabelHits(
                name=name[label_id],
                n=after[label_id].count,
                base=before[label_id].top_k,
                aligned=after[label_id].top_k,
            )
            for label_id in after
        ],
        transitions=count_transitions(base, aligned, truth, k),
        examples=_examples(task, records, base, aligned),
        notes=[
            f"Every method names {top} labels, including the teacher; top-{k} accuracy counts the first {k} of them.",
            *source_notes(config.prepare),
            *_retrieval_notes(evaluate.manifest.metrics),
            *_harness_notes(evaluate.manifest.metrics),
            *task.caveats(),
        ],
        seconds={stage: artifact.manifest.seconds for stage, artifact in done.items()},
        goodput={stage: measure_goodput(artifact.root, artifact.name) for stage, artifact in done.items()},
        artifacts={stage: artifact.uri for stage, artifact in done.items()},
        config={stage: artifact.manifest.config for stage, artifact in done.items()},
        versions=evaluate.manifest.versions,
    )


def read_outcome(train: Artifact) -> dict[str, Any]:
    """Return the record of a training: `log_history`, `counts` and `metrics`."""
    outcome: dict[str, Any] = json.loads(storage.read_bytes(train.file_uri("outcome.json")))
    return outcome


def source_notes(config: Prepare) -> list[str]:
    """Return what a reader needs to know about the source of the records."""
    notes = []
    if isinstance(config.source, Hpo):
        notes.append(
            "The patients are simulated from the annotations that the ontology teacher reads, so its accuracy on them "
            "is nearly perfect by construction. They show that the pipeline works, not its accuracy on real patients."
        )
    if config.match_texts is not None:
        notes.append(
            "Records that had an image and no text have the nearest text of another source, by the cosine similarity "
            f"of {config.match_texts.encoder.model_id}. These texts were written about other images."
        )
    return notes


def _examples(
    task: Task, records: Mapping[str, Record], base: Sequence[Prediction], aligned: Sequence[Prediction]
) -> list[Example]:
    """Return the first records with both answers."""
    name = {label.label_id: label.name for label in task.labels}
    before = {row.record_id: row.text for row in base}
    return [
        Example(
            record_id=row.record_id,
            prompt=task.note(records[row.record_id]),
            truth=name[records[row.record_id].label_id or ""],
            base=before[row.record_id],
            aligned=row.text,
        )
        for row in sorted(aligned, key=lambda row: row.record_id)[:MAX_EXAMPLES]
    ]


def _retrieval_notes(metrics: Mapping[str, Any]) -> list[str]:
    return [
        f"Retrieval: of {row['retrieved']['records']} records with a document of their true label, this document was "
        f"found for {row['retrieved']['recall']:.1%} and given to the {row['student']} student for "
        f"{row['shown']['recall']:.1%}."
        for row in metrics.get("retrieval", [])
        if row["retrieved"]
    ]


def _harness_notes(metrics: Mapping[str, Any]) -> list[str]:
    return [f"Benchmarks, {row['student']} student: {_results(row['tasks'])}." for row in metrics.get("harness", [])]


def _results(tasks: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{task} {metric} {value['value']:.3f}" for task, found in tasks.items() for metric, value in found.items()
    )
