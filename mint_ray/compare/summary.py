"""Collect everything that the report of a comparison shows from the artifacts of its runs."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mint_ray.artifacts import Artifact
from mint_ray.compare.plan import MethodPlan
from mint_ray.compare.statistics import MethodRuns, Statistics
from mint_ray.config.comparison import ComparisonConfig
from mint_ray.config.loader import dump
from mint_ray.metrics.near_duplicates import find_most_similar
from mint_ray.plan import Done
from mint_ray.records import Label, Method, Prediction, Record, TeacherScores
from mint_ray.reports.comparison import (
    ComparisonRow,
    ComparisonSummary,
    Cost,
    Disagreement,
    NearDuplicate,
    NearDuplicateCheck,
    Role,
)
from mint_ray.stages.report import read_outcome, source_notes
from mint_ray.tasks import Task, build_task

MAX_DISAGREEMENTS = 5
"""Number of records that the report shows in full because the methods disagree about them."""


def summarize_comparison(
    config: ComparisonConfig,
    plans: Sequence[MethodPlan],
    records: Artifact,
    runs: Mapping[str, Sequence[Done]],
    failed: Mapping[str, str],
) -> ComparisonSummary:
    """Return everything that the report of a comparison shows.

    Args:
        config: The comparison.
        plans: Its methods.
        records: Artifact of the records that all methods share.
        runs: Name of a method to the artifacts of its runs.
        failed: Name of a failed method to its error.
    """
    labels, record_rows = records.rows(Label, "labels"), records.rows(Record, "records")
    task = build_task(config.task, labels, config.pair.sampler.top)
    near_duplicates = find_near_duplicates(record_rows, task, config.near_duplicate_threshold)
    stats = Statistics(config, labels, record_rows)
    completed = {plan.name: plan for plan in plans if plan.name not in failed}
    rows = collect_runs(list(completed.values()), runs)
    # the teacher's ranking of the spec itself, not that of a method with another teacher
    by_differences = sorted(completed.values(), key=lambda plan: bool(plan.differences))
    rankings = read_rankings(runs[by_differences[0].name][0]["score"]) if by_differences else {}
    students = [row for row in rows if row.method.student != "teacher"]
    artifacts = {artifact.name: artifact for plan in plans for done in runs[plan.name] for artifact in done.values()}
    return ComparisonSummary(
        title=config.title,
        rows=[
            *(_row(row, completed.get(row.name or ""), runs, stats.estimate(row.runs, rankings)) for row in rows),
            *(_failed_row(plan, failed[plan.name]) for plan in plans if plan.name in failed),
        ],
        metric=config.metric,
        confidence=config.evaluate.confidence,
        tests=stats.compare(students, config.metric, config.reference),
        subgroups={subgroup: len(members) for subgroup, members in stats.subgroups.items()},
        confusions=stats.confusions(students),
        disagreements=find_disagreements(rows, task, record_rows, config.pair.sampler.top),
        near_duplicates=near_duplicates,
        counts=dict(records.manifest.counts),
        dropped=records.manifest.dropped,
        notes=_notes(config, task, near_duplicates, plans),
        spec=dump(config),
        manifests={
            name: {key: value for key, value in dataclasses.asdict(artifact.manifest).items() if key != "files"}
            for name, artifact in artifacts.items()
        },
    )


def collect_runs(plans: Sequence[MethodPlan], runs: Mapping[str, Sequence[Done]]) -> list[MethodRuns]:
    """Return the rows of the comparison in order: the teacher, the base student, then the methods in all modes.

    Teacher and base student come from a method that shares everything with the others, and are left out if there is
    none.
    """
    shared: dict[Method, MethodRuns] = {}
    own: dict[tuple[str, Method], MethodRuns] = {}
    for plan in plans:
        for done in runs[plan.name]:
            by_method: dict[Method, list[Prediction]] = {}
            for row in done["evaluate"].rows(Prediction, "predictions"):
                by_method.setdefault(row.method, []).append(row)
            for method, predictions in by_method.items():
                if method in plan.methods:
                    own.setdefault((plan.name, method), MethodRuns(name=plan.name, method=method, runs=[]))
                    own[plan.name, method].runs.append(predictions)
                elif method.student != "aligned" and not (method.retrieval or plan.differences or method in shared):
                    shared[method] = MethodRuns(name=None, method=method, runs=[predictions])
    teachers = [row for row in shared.values() if row.method.student == "teacher"]
    baselines = [row for row in shared.values() if row.method.student == "base"]
    return [*teachers, *baselines, *own.values()]


def read_rankings(scores: Artifact) -> dict[str, list[str]]:
    """Return the teacher's label ids of each test record, best first."""
    return {row.record_id: row.labels for row in scores.rows(TeacherScores, "scores") if row.split == "test"}


def find_near_duplicates(records: Sequence[Record], task: Task, threshold: float) -> NearDuplicateCheck:
    """Return the test notes whose similarity to a training or validation note is at least `threshold`."""
    by_id = {record.record_id: record for record in records}
    test_notes = {record.record_id: task.note(record) for record in records if record.split == "test"}
    seen_notes = {record.record_id: task.note(record) for record in records if record.split != "test"}
    matches = find_most_similar(test_notes, seen_notes)
    return NearDuplicateCheck(
        compared=len(matches),
        threshold=threshold,
        median=statistics.median(match.similarity for match in matches) if matches else 0.0,
        found=[
            NearDuplicate(
                record_id=match.record_id,
                seen_id=match.seen_id,
                similarity=match.similarity,
                same_label=by_id[match.record_id].label_id == by_id[match.seen_id].label_id,
                same_group=by_id[match.record_id].group_id == by_id[match.seen_id].group_id,
            )
            for match in matches
            if match.similarity >= threshold
        ],
    )


def find_disagreements(
    rows: Sequence[MethodRuns], task: Task, records: Sequence[Record], length: int
) -> list[Disagreement]:
    """Return the test records on which the rows are most evenly divided into right and wrong, by their first runs.

    Of a row that ranks all labels, the first `length` are shown.
    """
    name = {label.label_id: label.name for label in task.labels}
    answers = {row.key: {answer.record_id: answer for answer in row.runs[0]} for row in rows}
    test_records = {record.record_id: record for record in records if record.split == "test"}
    correct = {
        record_id: [
            key
            for key, by_record in answers.items()
            if by_record[record_id].reason is None and by_record[record_id].labels[:1] == [record.label_id]
        ]
        for record_id, record in test_records.items()
    }
    divided = [record_id for record_id in test_records if 0 < len(correct[record_id]) < len(answers)]
    divided.sort(key=lambda record_id: (abs(len(correct[record_id]) - len(answers) / 2), record_id))

    def text_of(answer: Prediction) -> str:
        return answer.text or "\n".join(name.get(label_id, label_id) for label_id in answer.labels[:length])

    return [
        Disagreement(
            record_id=record_id,
            prompt=task.note(test_records[record_id]),
            truth=name[test_records[record_id].label_id or ""],
            answers={key: text_of(by_record[record_id]) for key, by_record in answers.items()},
            correct=correct[record_id],
        )
        for record_id in divided[:MAX_DISAGREEMENTS]
    ]


def _row(
    row: MethodRuns, plan: MethodPlan | None, runs: Mapping[str, Sequence[Done]], estimated: Mapping[str, Any]
) -> ComparisonRow:
    if plan is None:
        role: Role = "ceiling" if row.method.student == "teacher" else "baseline"
        return ComparisonRow(name=None, method=row.method, role=role, runs=len(row.runs), **estimated)
    is_trained = plan.student == "aligned"
    return ComparisonRow(
        name=row.name,
        method=row.method,
        role=plan.role,
        runs=len(row.runs),
        differences=plan.differences,
        cost=_cost(plan, runs[plan.name]) if is_trained else None,
        log_history=read_outcome(runs[plan.name][0]["train"])["log_history"] if is_trained else [],
        **estimated,
    )


def _failed_row(plan: MethodPlan, error: str) -> ComparisonRow:
    return ComparisonRow(
        name=plan.name, method=plan.methods[0], role=plan.role, runs=0, differences=plan.differences, error=error
    )


def _cost(plan: MethodPlan, runs: Sequence[Done]) -> Cost:
    def mean(number_of: Callable[[Done], float]) -> float:
        return statistics.fmean(number_of(done) for done in runs)

    answers = [f"answer/{method.key}" for method in plan.methods]
    return Cost(
        pairs=mean(lambda done: done["pair"].manifest.counts["pairs_train"]),
        tokens=mean(lambda done: done["train"].manifest.metrics["tokens"]),
        steps=mean(lambda done: done["train"].manifest.metrics["steps"]),
        seconds={
            "pair": mean(lambda done: done["pair"].manifest.seconds),
            "tokenize": mean(lambda done: done["tokenize"].manifest.seconds),
            "train": mean(lambda done: done["train"].manifest.seconds),
            "answer": mean(lambda done: sum(done[key].manifest.seconds for key in answers)),
        },
    )


CONTROL_NOTES = {
    "swapped": (
        "Control swapped: chosen and rejected are exchanged in half of the records, which leaves no preference to "
        "learn. A gain over the base student comes from the likelihood of the lists alone."
    ),
    "relabelled": (
        "Control relabelled: every label was trained under the name of another. It must be no better than chance; "
        "otherwise the input reveals the answer."
    ),
    "shuffled": (
        "Control shuffled: the student was given the image of another record, in training and in evaluation. It must "
        "be no better than chance; otherwise something other than the image reveals the answer."
    ),
}


def _notes(
    config: ComparisonConfig, task: Task, near_duplicates: NearDuplicateCheck, plans: Sequence[MethodPlan]
) -> list[str]:
    top, seeds, labels = config.pair.sampler.top, len(config.seeds), len(task.labels)
    controls = {plan.configs[0].pair.control for plan in plans}
    return [
        "Methods differ only in what they override in the spec. They share records, splits, student, adapter, batch "
        f"size, epochs, learning rate and the length of the answers ({top} names, also for the teacher).",
        f"An answer that cannot be parsed counts as wrong. A random first name is right in {1 / labels:.1%} of cases, "
        f"a random list of {top} in {min(1.0, top / labels):.1%}.",
        "Intervals: bootstrap over groups (persons or publications)"
        + (f" and over the {seeds} runs of each method." if seeds > 1 else "; each method was trained once."),
        *(note for control, note in CONTROL_NOTES.items() if control in controls),
        *([near_duplicates.sentence] if near_duplicates.found else []),
        *source_notes(config.prepare),
        *task.caveats(),
    ]
