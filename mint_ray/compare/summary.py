"""Gather from the runs of all methods what the report of a comparison shows."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mint_ray.artifacts import Artifact
from mint_ray.compare.plan import Method
from mint_ray.compare.statistics import Answers, Judge
from mint_ray.config.comparison import ComparisonConfig
from mint_ray.config.loader import dump
from mint_ray.metrics.near_duplicates import find_nearest
from mint_ray.records import Label, Prediction, Record, TeacherScores
from mint_ray.reports.comparison import (
    ComparisonSummary,
    Cost,
    Disagreement,
    LeakCheck,
    MethodSummary,
    NearDuplicate,
)
from mint_ray.stages.evaluate import ALIGNED, BASE, TEACHER, WITH_PASSAGES
from mint_ray.stages.report import read_outcome, source_notes
from mint_ray.tasks import Task, build_task

Done = dict[str, Artifact]

DISAGREEMENTS = 5


def summarise_comparison(
    config: ComparisonConfig,
    methods: Sequence[Method],
    records: Artifact,
    runs: Mapping[str, Sequence[Done]],
    failed: Mapping[str, str],
) -> ComparisonSummary:
    """Everything that the report of a comparison shows."""
    labels = records.rows(Label, "labels")
    rows = records.rows(Record, "records")
    held_out = {record.record_id: record for record in rows if record.split == "test"}
    asked = build_task(config.task, labels, config.pair.sampler.top)
    leaks = check_leaks(rows, asked, config.max_similarity)
    judge = Judge(config, labels, rows)
    answers = collect_answers(methods, runs, failed)
    # the ranking that all are set beside is the one of the spec, not that of a method with a teacher of its own
    in_order = sorted(methods, key=lambda method: bool(method.unequal))
    finished = [runs[method.name][0] for method in in_order if method.name not in failed]
    rankings = read_rankings(finished[0]["score"]) if finished else {}
    by_name = {method.name: method for method in methods}
    measured: list[MethodSummary] = []
    for name, given in answers.items():
        method = by_name.get(name.removesuffix(given.decoding))
        measured.append(
            MethodSummary(
                name=name,
                role=method.role if method else ("ceiling" if name.startswith(TEACHER) else "baseline"),
                runs=len(given.runs),
                unequal=method.unequal if method else [],
                cost=_cost(runs[method.name]) if method and method.student == ALIGNED else None,
                log_history=_history(runs[method.name][0]) if method and method.student == ALIGNED else [],
                **judge.judge(given.runs, rankings),
            )
        )
    measured += [
        MethodSummary(name=name, role=by_name[name].role, runs=0, unequal=by_name[name].unequal, error=error)
        for name, error in failed.items()
    ]
    student_answers = {name: given for name, given in answers.items() if not name.startswith(TEACHER)}
    artifacts = {
        artifact.name: artifact for method in methods for done in runs[method.name] for artifact in done.values()
    }
    return ComparisonSummary(
        title=config.title,
        methods=measured,
        metric=config.metric,
        confidence=config.evaluate.confidence,
        tests=judge.test(student_answers, config.metric, config.reference),
        parts={part: len(members) for part, members in judge.parts.items()},
        confusions=judge.confusions(student_answers),
        disagreements=_disagreements(answers, asked, held_out, judge.name, config.pair.sampler.top),
        leaks=leaks,
        counts=dict(records.manifest.counts),
        dropped=records.manifest.dropped,
        notes=_notes(config, asked, len(labels), leaks, methods),
        spec=dump(config),
        manifests={
            name: {key: value for key, value in dataclasses.asdict(artifact.manifest).items() if key != "files"}
            for name, artifact in artifacts.items()
        },
    )


def collect_answers(
    methods: Sequence[Method], runs: Mapping[str, Sequence[Done]], failed: Mapping[str, str]
) -> dict[str, Answers]:
    """The rows of the table, in its order: teacher and base student of the spec itself, then every method that ran."""
    found: dict[str, Answers] = {}
    for method in methods:
        if method.name in failed:
            continue
        for done in runs[method.name]:
            by_name: dict[str, list[Prediction]] = {}
            for row in done["evaluate"].rows(Prediction, "predictions"):
                by_name.setdefault(row.method, []).append(row)
            for name, predictions in by_name.items():
                read, plain = WITH_PASSAGES in name, name.replace(WITH_PASSAGES, "")
                if plain.startswith(method.student) and read == method.reads:
                    decoding = plain.removeprefix(method.student)
                    made = found.setdefault(method.name + decoding, Answers(runs=[], decoding=decoding))
                    made.runs.append(predictions)
                elif name.startswith((TEACHER, BASE)) and not (read or method.unequal or name in found):
                    student = TEACHER if name.startswith(TEACHER) else BASE
                    found[name] = Answers(runs=[predictions], decoding=name.removeprefix(student))
    # sorting is stable: within each the order is that of the evaluation, and of the spec
    order = {name: next((place for place, x in enumerate((TEACHER, BASE)) if name.startswith(x)), 2) for name in found}
    return {name: found[name] for name in sorted(found, key=order.__getitem__)}


def read_rankings(scores: Artifact) -> dict[str, list[str]]:
    """The teacher's label ids of each test record, best first."""
    return {row.record_id: row.labels for row in scores.rows(TeacherScores, "scores") if row.split == "test"}


def check_leaks(records: Sequence[Record], task: Task, threshold: float) -> LeakCheck:
    """How like the notes of the test split are to those of the others; at least `threshold` is a near-duplicate."""
    by_id = {record.record_id: record for record in records}
    notes: dict[bool, dict[str, str]] = {True: {}, False: {}}
    for record in records:
        notes[record.split == "test"][record.record_id] = task.note(record)
    nearest = find_nearest(notes[True], notes[False])
    return LeakCheck(
        compared=len(nearest),
        threshold=threshold,
        median=statistics.median(leak.similarity for leak in nearest) if nearest else 0.0,
        found=[
            NearDuplicate(
                record_id=leak.record_id,
                seen_id=leak.seen_id,
                similarity=leak.similarity,
                same_label=by_id[leak.record_id].label_id == by_id[leak.seen_id].label_id,
                same_group=by_id[leak.record_id].group_id == by_id[leak.seen_id].group_id,
            )
            for leak in nearest
            if leak.similarity >= threshold
        ],
    )


def _disagreements(
    answers: Mapping[str, Answers],
    task: Task,
    held_out: Mapping[str, Record],
    name: Mapping[str, str],
    length: int,
) -> list[Disagreement]:
    """Records over which the methods are most evenly divided, by their first runs."""
    said = {method: {row.record_id: row for row in given.runs[0]} for method, given in answers.items()}
    right = {
        record_id: [
            method
            for method, rows in said.items()
            if rows[record_id].reason is None and rows[record_id].labels[:1] == [record.label_id]
        ]
        for record_id, record in held_out.items()
    }
    divided = [record_id for record_id in held_out if 0 < len(right[record_id]) < len(said)]
    divided.sort(key=lambda record_id: (abs(len(right[record_id]) - len(said) / 2), record_id))
    return [
        Disagreement(
            record_id=record_id,
            prompt=task.note(held_out[record_id]),
            truth=name[held_out[record_id].label_id or ""],
            answers={
                method: rows[record_id].text or "\n".join(name.get(x, x) for x in rows[record_id].labels[:length])
                for method, rows in said.items()
            },
            right=right[record_id],
        )
        for record_id in divided[:DISAGREEMENTS]
    ]


def _cost(runs: Sequence[Done]) -> Cost:
    def mean(numbers: Iterator[float]) -> float:
        return statistics.fmean(numbers)

    return Cost(
        pairs=mean(done["pair"].manifest.counts["pairs_train"] for done in runs),
        tokens=mean(done["train"].manifest.metrics["tokens"] for done in runs),
        steps=mean(done["train"].manifest.metrics["steps"] for done in runs),
        seconds={
            stage: mean(done[stage].manifest.seconds for done in runs)
            for stage in ("pair", "tokenize", "train", "evaluate")
        },
    )


def _history(done: Done) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = read_outcome(done["train"])["log_history"]
    return history


def _notes(config: ComparisonConfig, task: Task, labels: int, leaks: LeakCheck, methods: Sequence[Method]) -> list[str]:
    top = config.pair.sampler.top
    seeds = len(config.seeds)
    notes = [
        "Methods differ only in what they override in the spec: records, splits, student, adapter, batch, epochs, "
        f"learning rate and the length of the answers ({top} names, the teacher's too) are shared.",
        f"An answer that cannot be read is wrong. A blind first guess is right in {1 / labels:.1%} of cases, a list of "
        f"{top} in {min(1.0, top / labels):.1%}.",
        "Intervals come from drawing whole groups (persons or publications) with replacement"
        + (
            f", and the {seeds} trained students of each method too."
            if seeds > 1
            else "; one student was trained each."
        ),
    ]
    controls = {method.configs[0].pair.control for method in methods}
    if "swapped" in controls:
        notes.append(
            "Control swapped: in half of the records chosen and rejected are exchanged, so that no preference is "
            "left to learn. What it gains over the base student comes from the likelihood of the lists alone."
        )
    if "relabelled" in controls:
        notes.append(
            "Control relabelled: every label was taught under another's name. It must be no better than chance; if "
            "it is, something tells the student the answer."
        )
    if "shuffled" in controls:
        notes.append(
            "Control shuffled: the student was shown the image of another record, when it learned and when it was "
            "asked. It must be no better than chance; if it is, something other than the image tells it the answer."
        )
    if leaks.found:
        notes.append(f"Leak check: {leaks.sentence}")
    return [*notes, *source_notes(config.prepare), *task.notes()]
