"""Measure every method on the held-out records: the teacher, and base and aligned student."""

from __future__ import annotations

import json
from collections.abc import Sequence

from mint_ray import lineage
from mint_ray.artifacts import Artifact
from mint_ray.config.stages import Evaluate
from mint_ray.lineage import ABLATION, EvaluationInputs
from mint_ray.metrics import Resampling, measure
from mint_ray.metrics.methods import METHODS, to_rows
from mint_ray.records import Method, Prediction, Record, TeacherScores
from mint_ray.samplers import AnySampler
from mint_ray.tasks.config import AnyTask


def evaluate_student(
    root: str, config: Evaluate, task: AnyTask, sampler: AnySampler, inputs: EvaluationInputs
) -> Artifact:
    """Write table `predictions` (every method, every record of the split) and `metrics.json`.

    The metrics of the manifest have a row per method under `methods` (`mint_ray.metrics.methods`), and per student
    under `retrieval` and `harness`.
    """
    artifact = lineage.evaluate(root, config, task, sampler, inputs)
    if artifact.is_complete:
        return artifact
    records = [record for record in inputs.records.rows(Record, "records") if record.split == config.split]
    with artifact.write() as draft:
        predictions = _teacher_predictions(inputs.scores, records, sampler.top)
        for method, answers in inputs.answers.items():
            predictions[method] = answers.rows(Prediction, "answers")
        rankings = {
            row.record_id: row.labels
            for row in inputs.scores.rows(TeacherScores, "scores")
            if row.split == config.split
        }
        resampling = Resampling(resamples=config.resamples, confidence=config.confidence, seed=config.seed)
        measured = {
            method: measure(
                rows,
                truth={record.record_id: record.label_id or "" for record in records},
                teacher=rankings,
                group={record.record_id: record.group_id for record in records},
                top=sampler.top,
                bottom=sampler.num_rejected,
                resampling=resampling,
            )
            for method, rows in predictions.items()
        }
        draft.metrics[METHODS] = to_rows(measured)
        if inputs.passages:
            draft.metrics["retrieval"] = [
                {"student": student, **artifact.manifest.metrics} for student, artifact in inputs.passages.items()
            ]
        if inputs.benchmarks:
            draft.metrics["harness"] = [
                {"student": student, "tasks": artifact.manifest.metrics}
                for student, artifact in inputs.benchmarks.items()
            ]
        for method, rows in predictions.items():
            draft.dropped.update(f"{method.title}: {row.reason}" for row in rows if row.reason)
        draft.write_rows(Prediction, "predictions", (row for rows in predictions.values() for row in rows))
        draft.counts["records"] = len(records)
        draft.counts["groups"] = len({record.group_id for record in records})
        draft.write_text("metrics.json", json.dumps(draft.metrics, indent=1))
    return artifact


def _teacher_predictions(
    scores: Artifact, records: Sequence[Record], num_labels: int
) -> dict[Method, list[Prediction]]:
    """Return the teacher's answers: as many labels as a student lists, so that both are measured on equal lists."""
    predictions: dict[Method, list[Prediction]] = {}
    ablated = [table for table in scores.tables() if table.startswith(ABLATION)]
    for table in ["scores", *ablated]:
        by_id = {row.record_id: row for row in scores.rows(TeacherScores, table)}
        method = Method(student="teacher", ablated=table.removeprefix(ABLATION) if table in ablated else None)
        predictions[method] = [
            Prediction(
                record_id=record.record_id,
                student=method.student,
                ablated=method.ablated,
                labels=by_id[record.record_id].labels[:num_labels],
                text="",
                reason=by_id[record.record_id].reason,
            )
            for record in records
        ]
    return predictions
