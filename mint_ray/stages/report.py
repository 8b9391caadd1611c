"""Put what a run found on one page, in Markdown and in the terminal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from mint_ray import storage
from mint_ray.artifacts import Artifact, open_artifact
from mint_ray.config.loader import from_data
from mint_ray.config.stages import METRIC_SECTIONS, Evaluate, Prepare
from mint_ray.metrics import Estimate, moved, per_label
from mint_ray.records import Label, Prediction, Record
from mint_ray.reports import Example, LabelHits, RunSummary, render_html, render_markdown, render_terminal
from mint_ray.runtime.goodput import measure_goodput
from mint_ray.sources.config import Hpo
from mint_ray.tasks import build_task
from mint_ray.tasks.config import AnyTask

PAGE, TABLE, MARKDOWN, GOODPUT = "report.html", "table.txt", "report.md", "goodput.json"
BASE, ALIGNED = "base student", "aligned student"
EXAMPLES = 4


def write_report(root: str, title: str, task: AnyTask, done: Mapping[str, Artifact]) -> Artifact:
    """`report.html`, `report.md`, `table.txt` and `goodput.json` from the artifacts of every stage before it."""
    inputs = {stage: artifact.name for stage, artifact in done.items()}
    artifact = open_artifact(root, "report", {"title": title}, inputs)
    if artifact.is_complete:
        return artifact
    with artifact.write() as draft:
        summary = summarise(title, task, done)
        draft.write_text(PAGE, render_html(summary))
        draft.write_text(MARKDOWN, render_markdown(summary))
        draft.write_text(TABLE, render_terminal(summary))
        spent = {stage: dataclasses.asdict(goodput) for stage, goodput in summary.goodput.items()}
        draft.write_text(GOODPUT, json.dumps(spent, indent=1))
    return artifact


def summarise(title: str, task: AnyTask, done: Mapping[str, Artifact]) -> RunSummary:
    """Everything the report shows, read from manifests, predictions and the training log."""
    prepare, evaluate = done["prepare"], done["evaluate"]
    labels = prepare.rows(Label, "labels")
    settings = from_data(Evaluate, evaluate.manifest.config["evaluate"])
    held_out = {row.record_id: row for row in prepare.rows(Record, "records") if row.split == settings.split}
    truth = {record_id: row.label_id or "" for record_id, row in held_out.items()}
    predictions = evaluate.rows(Prediction, "predictions")
    base = [row for row in predictions if row.method == BASE]
    aligned = [row for row in predictions if row.method == ALIGNED]
    length = evaluate.manifest.config["lists"]["top"]
    asked = build_task(task, labels, length)
    name = {label.label_id: label.name for label in labels}
    before, after = per_label(base, truth), per_label(aligned, truth)
    outcome = read_outcome(done["train"])
    said = {row.record_id: row.text for row in base}
    prepared = from_data(Prepare, prepare.manifest.config["prepare"])
    return RunSummary(
        title=title,
        methods={
            method: {key: Estimate(**value) for key, value in measured.items()}
            for method, measured in evaluate.manifest.metrics.items()
            if method not in METRIC_SECTIONS
        },
        confidence=settings.confidence,
        counts={stage: dict(artifact.manifest.counts) for stage, artifact in done.items()},
        dropped={stage: artifact.manifest.dropped for stage, artifact in done.items() if artifact.manifest.dropped},
        log_history=outcome["log_history"],
        per_label=[
            LabelHits(
                name=name[label_id],
                n=after[label_id].count,
                base=before[label_id].top_10,
                aligned=after[label_id].top_10,
            )
            for label_id in after
        ],
        moved=moved(base, aligned, truth),
        examples=[
            Example(
                record_id=row.record_id,
                prompt=asked.note(held_out[row.record_id]),
                truth=name[truth[row.record_id]],
                base=said[row.record_id],
                aligned=row.text,
            )
            for row in sorted(aligned, key=lambda row: row.record_id)[:EXAMPLES]
        ],
        notes=[
            f"Every method names {length} labels, the teacher too, so top-10 accuracy means anywhere in the list.",
            *source_notes(prepared),
            *_section_notes(evaluate.manifest.metrics),
            *asked.notes(),
        ],
        seconds={stage: artifact.manifest.seconds for stage, artifact in done.items()},
        goodput={stage: measure_goodput(artifact.root, artifact.name) for stage, artifact in done.items()},
        artifacts={stage: artifact.uri for stage, artifact in done.items()},
        config={stage: artifact.manifest.config for stage, artifact in done.items()},
        versions=evaluate.manifest.versions,
    )


def _section_notes(metrics: Mapping[str, Any]) -> list[str]:
    """What `evaluate` found beside the methods' answers, a sentence for each student."""
    notes = []
    for method, measured in metrics.get("retrieval", {}).items():
        found, shown = measured["retrieved"], measured["shown"]
        if found:
            notes.append(
                f"Of {found['records']} records that have a document of their true label, it was found for "
                f"{found['recall']:.1%} and shown to the {method.split(' with ')[0]} for {shown['recall']:.1%}."
            )
    for method, tasks in metrics.get("general", {}).items():
        values = [
            f"{task} {name} {value['value']:.3f}" for task, found in tasks.items() for name, value in found.items()
        ]
        notes.append(f"Beside the task, the {method} reaches {', '.join(values)}.")
    return notes


def read_outcome(train: Artifact) -> dict[str, Any]:
    """What training leaves beside the student: `log_history`, `counts` and `metrics`."""
    outcome: dict[str, Any] = json.loads(storage.read_bytes(train.file_uri("outcome.json")))
    return outcome


def source_notes(config: Prepare) -> list[str]:
    """What a reader must know of where the records come from."""
    notes = []
    if isinstance(config.source, Hpo):
        notes.append(
            "The patients are drawn from the annotations that the ontology teacher reads, so it is near perfect on "
            "them by construction; they show that the chain works, not how well it would do on real patients."
        )
    if config.pair_texts is not None:
        notes.append(
            "Records that came with an image and no text have the nearest text of another source, by the cosine of "
            f"{config.pair_texts.encoder.model_id}: it was written about another image."
        )
    return notes
