"""Compare methods on equal terms: one spec, and for each method the keys in which it differs from the others."""

from __future__ import annotations

import dataclasses
import json
import logging
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mint_ray.artifacts import Artifact, open_artifact
from mint_ray.config import ComparisonConfig, PipelineConfig
from mint_ray.loading import RESOURCES, UserError, dump, replace
from mint_ray.metrics import (
    adjust_holm,
    compare_pair,
    count_confused,
    measure_as_paper,
    measure_runs,
    strata,
)
from mint_ray.metrics.leaks import find_nearest
from mint_ray.pipeline import check_pipeline, run_pipeline
from mint_ray.records import Label, Prediction, Record, TeacherScores
from mint_ray.reports.comparison import (
    ComparisonSummary,
    Confusion,
    Cost,
    Disagreement,
    LeakCheck,
    MethodSummary,
    NearDuplicate,
    PairedTest,
    Role,
    render_markdown,
    render_terminal,
)
from mint_ray.reports.comparison_page import render_html
from mint_ray.stages.evaluate import ALIGNED, BASE, TEACHER, WITH_PASSAGES
from mint_ray.stages.pair import check_lengths
from mint_ray.stages.report import MARKDOWN, PAGE, TABLE, read_outcome, source_notes
from mint_ray.tasks import Task, build_task

logger = logging.getLogger("mint_ray")

Done = dict[str, Artifact]

SUMMARY = "comparison.json"
STUDENT, UNEQUAL = "student", "unequal"
"""Keys of a method that are no keys of the pipeline's config."""

FREE = ("train.trainer.objective", "pair.sampler", "pair.control", "evaluate.retrieval")
"""Where methods may differ: what is learned from, how, and what else is read to answer."""
SHARED = ("pair.sampler.top", "pair.sampler.pairs_per_record")
"""Where they may not, all the same: the length of the answers, and how much there is to learn from."""

CONFUSED, DISAGREEMENTS = 10, 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One way of making a student, resolved: a pipeline config for each seed."""

    name: str
    configs: list[PipelineConfig]
    student: str
    """BASE or ALIGNED: whose answers are judged."""
    unequal: list[str]

    @property
    def reads(self) -> bool:
        """Whether passages are put ahead of the note: only answers given with them then count."""
        return self.configs[0].evaluate.retrieval is not None

    @property
    def role(self) -> Role:
        return "control" if self.configs[0].pair.control else "method"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """The predictions of one row of the table, one list for each run."""

    runs: list[list[Prediction]]
    decoding: str
    """What the name of the answers has behind the student's, such as `, ranked`: only like is tested against like."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """What a comparison left behind."""

    report: Artifact
    failed: dict[str, str]
    """Method to why it has no numbers."""


def run_comparison(config: ComparisonConfig) -> Compared:
    """Run every method with every seed, one after the other, then write the report.

    What methods share is done once, and what is complete is not done again, so that the same command goes on after an
    interruption. A method that fails is left without numbers, and the others go on. Raises UserError, before any work,
    for a method that cannot be run or is not on equal terms.
    """
    methods = plan_methods(config)
    shared = shared_config(config)
    for each in (shared, *(method.configs[0] for method in methods)):
        check_pipeline(each)
    records = run_pipeline(shared, "prepare")["prepare"]
    for each in (shared, *(method.configs[0] for method in methods)):
        check_lengths(each.pair, records.manifest.counts["labels"])
    runs: dict[str, list[Done]] = {}
    failed: dict[str, str] = {}
    for method in methods:
        runs[method.name] = []
        for number, each in enumerate(method.configs, start=1):
            logger.info("compare: %s, run %d of %d", method.name, number, len(method.configs))
            try:
                runs[method.name].append(run_pipeline(each, "evaluate"))
            except Exception as error:
                failed[method.name] = one_line(error)
                told = None if isinstance(error, UserError) else error
                logger.error("compare: %s failed: %s", method.name, failed[method.name], exc_info=told)
                break
    report = write_comparison(config, methods, records, runs, failed)
    return Compared(report=report, failed=failed)


def shared_config(config: ComparisonConfig) -> PipelineConfig:
    """The run that every method is laid over."""
    return PipelineConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(PipelineConfig)})


def plan_methods(config: ComparisonConfig) -> list[Method]:
    """Every method with its resolved configs. Raises UserError for one that is wrong, or not on equal terms."""
    return [_plan(config, name, said) for name, said in config.methods.items()]


def _plan(config: ComparisonConfig, name: str, said: Mapping[str, Any]) -> Method:
    where = f"methods.{name}"
    overrides = {key: value for key, value in said.items() if key not in (STUDENT, UNEQUAL)}
    student, unequal = said.get(STUDENT, "aligned"), said.get(UNEQUAL, False)
    if student not in ("base", "aligned"):
        raise UserError(f"{where}.{STUDENT}: expected base or aligned, got {student!r}")
    if not isinstance(unequal, bool):
        raise UserError(f"{where}.{UNEQUAL}: expected true or false, got {unequal!r}")
    shared = shared_config(config)
    try:
        changed = replace(shared, overrides)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('config: ')}") from error
    differing = _differing(shared, changed)
    if differing and not unequal:
        raise UserError(
            f"{where}: {', '.join(differing)}: all methods share this; `unequal: true` compares all the same, and says "
            "so in the table"
        )
    # the base student is not trained, so there is nothing for a seed to change
    seeds = config.seeds if student == "aligned" else config.seeds[:1]
    return Method(
        name=name,
        configs=[_seeded(changed, seed) for seed in seeds],
        student=ALIGNED if student == "aligned" else BASE,
        unequal=differing,
    )


def _seeded(config: PipelineConfig, seed: int) -> PipelineConfig:
    changes = {"train.trainer.seed": seed}
    if config.pair.sampler.draws_at_random:
        changes["pair.sampler.seed"] = seed
    return replace(config, changes)


def _differing(shared: PipelineConfig, changed: PipelineConfig) -> list[str]:
    """Dotted paths of what the two should share and do not, in the order of the config."""
    ours, theirs = dict(_leaves(dump(shared))), dict(_leaves(dump(changed)))
    nothing = object()
    return [
        path
        for path in dict.fromkeys([*ours, *theirs])
        if ours.get(path, nothing) != theirs.get(path, nothing)
        and (path in SHARED or not any(path == free or path.startswith(f"{free}.") for free in FREE))
        and RESOURCES not in path.split(".")
    ]


def _leaves(data: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def write_comparison(
    config: ComparisonConfig,
    methods: Sequence[Method],
    records: Artifact,
    runs: Mapping[str, Sequence[Done]],
    failed: Mapping[str, str],
) -> Artifact:
    """`report.html`, `report.md`, `table.txt` and `comparison.json` from what the runs left behind."""
    said = dump(config)
    settings = {key: said[key] for key in ("title", "methods", "seeds", "metric", "reference", "max_similarity")}
    settings |= {"evaluate": said["evaluate"], "pair": said["pair"], "task": said["task"]}
    inputs = {"records": records.name} | {
        f"{method.name}, run {number}": done["evaluate"].name
        for method in methods
        if method.name not in failed
        for number, done in enumerate(runs[method.name], start=1)
    }
    inputs |= {f"{name}, failed": error for name, error in failed.items()}
    artifact = open_artifact(config.root, "compare", settings, inputs)
    if artifact.is_complete:
        return artifact
    with artifact.write() as draft:
        summary = summarise_comparison(config, methods, records, runs, failed)
        draft.write_text(PAGE, render_html(summary))
        draft.write_text(MARKDOWN, render_markdown(summary))
        draft.write_text(TABLE, render_terminal(summary))
        draft.write_text(SUMMARY, json.dumps(dump(summary), indent=1))
        draft.counts.update({"methods": len(methods), "methods_failed": len(failed), "records": sum(_tests(records))})
        if summary.leaks:
            draft.counts["near_duplicates"] = len(summary.leaks.found)
            if summary.leaks.found:
                logger.warning("compare: %s", summary.leaks.sentence)
        draft.metrics = {
            method.name: {name: dataclasses.asdict(value) for name, value in method.estimates.items()}
            for method in summary.measured
        }
    return artifact


def _tests(records: Artifact) -> list[int]:
    return [records.manifest.counts["records_test"]]


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


class Judge:
    """Holds the truth of the test records, and measures and tests methods by it."""

    def __init__(self, config: ComparisonConfig, labels: Sequence[Label], records: Sequence[Record]) -> None:
        held_out = [record for record in records if record.split == "test"]
        self.settings, self.sampler = config.evaluate, config.pair.sampler
        self.name = {label.label_id: label.name for label in labels}
        self.truth = {record.record_id: record.label_id or "" for record in held_out}
        self.group = {record.record_id: record.group_id for record in held_out}
        trained = Counter(record.label_id or "" for record in records if record.split == "train")
        self.parts = strata(held_out, {label.label_id: trained[label.label_id] for label in labels})

    def judge(self, runs: Sequence[Sequence[Prediction]], rankings: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """Of one method: `estimates`, `strata`, `paper` and `unread` of its row."""
        settings, sampler = self.settings, self.sampler
        lists = {"top": sampler.top, "bottom": sampler.rejected_length}
        paper = [
            measure_as_paper(predictions, truth=self.truth, teacher=rankings, name=self.name, **lists)
            for predictions in runs
        ]

        def measured(truth: Mapping[str, str]) -> dict[str, Any]:
            return dict(
                measure_runs(
                    runs,
                    truth=truth,
                    teacher=rankings,
                    group=self.group,
                    **lists,
                    resamples=settings.resamples,
                    confidence=settings.confidence,
                    seed=settings.seed,
                )
            )

        return {
            "estimates": measured(self.truth),
            "strata": {
                part: measured({key: self.truth[key] for key in sorted(members)})["top_1_accuracy"]
                for part, members in self.parts.items()
            },
            "paper": {
                metric: statistics.fmean(found[metric] for found in paper)
                for metric in (paper[0] if all(paper) else {})
            },
            "unread": dict(Counter(row.reason for predictions in runs for row in predictions if row.reason)),
        }

    def test(self, answers: Mapping[str, Answers], metric: str, reference: str | None) -> list[PairedTest]:
        """The reference against every other method, or each against each; p with Holm's correction."""
        names = list(answers)
        pairs = [
            (first, second)
            for first in names
            for second in names
            if first != second
            and answers[first].decoding == answers[second].decoding
            and (
                first == f"{reference}{answers[first].decoding}"
                if reference
                else names.index(first) > names.index(second)
            )
        ]
        found = [
            compare_pair(
                answers[first].runs,
                answers[second].runs,
                metric=metric,
                top=self.sampler.top,
                truth=self.truth,
                group=self.group,
                resamples=self.settings.resamples,
                confidence=self.settings.confidence,
                seed=self.settings.seed,
            )
            for first, second in pairs
        ]
        adjusted = adjust_holm([difference.p for difference in found])
        return [
            PairedTest(first=first, second=second, difference=difference, adjusted=p)
            for (first, second), difference, p in zip(pairs, found, adjusted, strict=True)
        ]

    def confusions(self, answers: Mapping[str, Answers]) -> list[Confusion]:
        """The pairs of labels that are confused most over all methods; by each, the mean over its runs."""
        counts = {name: count_confused(given.runs, self.truth) for name, given in answers.items()}
        total = sum(counts.values(), Counter[tuple[str, str]]())
        worst = sorted(total, key=lambda pair: (-total[pair], pair))[:CONFUSED]
        return [
            Confusion(
                truth=self.name[truth],
                named=self.name.get(named, named),
                counts={name: counts[name][truth, named] / len(given.runs) for name, given in answers.items()},
            )
            for truth, named in worst
        ]


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
            "Control `swapped`: in half of the records chosen and rejected are exchanged, so that no preference is "
            "left to learn. What it gains over the base student comes from the likelihood of the lists alone."
        )
    if "relabelled" in controls:
        notes.append(
            "Control `relabelled`: every label was taught under another's name. It must be no better than chance; if "
            "it is, something tells the student the answer."
        )
    if "shuffled" in controls:
        notes.append(
            "Control `shuffled`: the student was shown the image of another record, when it learned and when it was "
            "asked. It must be no better than chance; if it is, something other than the image tells it the answer."
        )
    if leaks.found:
        notes.append(f"Leak check: {leaks.sentence}")
    return [*notes, *source_notes(config.prepare), *task.notes()]


def one_line(error: BaseException) -> str:
    """What went wrong, as it stands in the table."""
    # what Ray carries over it wraps, and ends with advice of its own
    inner = getattr(error, "cause", None) or error.__cause__
    if isinstance(inner, BaseException):
        return one_line(inner)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return lines[-1] if isinstance(error, UserError) else f"{type(error).__name__}: {lines[-1]}"
