"""What a comparison of methods has to say, as plain data, and how its table is written as text and as Markdown."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import Any, Literal

from mint_ray.metrics import METRICS, PAPER_METRICS, Difference, Estimate
from mint_ray.reports.summary import NOTHING, RESEARCH_USE, show, show_seconds, title_of

Role = Literal["ceiling", "baseline", "method", "control"]

TABLES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "Against the truth",
        ("top_1_accuracy", "top_10_accuracy", "mean_reciprocal_rank", "macro_top_1_accuracy"),
    ),
    (
        "Made-up names, and the teacher's ranking",
        ("hallucination_free_accuracy", "hallucination_rate", "readable", "coverage", "avoidance", "car"),
    ),
    ("Calibration of answers that rank", ("expected_calibration_error", "brier_score")),
)
"""The metrics in the tables in which they are shown, few enough side by side for a page."""

WIDTH = 100
SHOWN_LEAKS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a method took, the mean over its runs."""

    pairs: float
    """Pairs to train on."""
    tokens: float
    """Tokens run in training."""
    steps: float
    seconds: dict[str, float]
    """Stage to wall-clock seconds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodSummary:
    """One row of the comparison."""

    name: str
    role: Role
    runs: int
    """With how many seeds it was trained; 1 for what is not trained."""
    estimates: dict[str, Estimate] = dataclasses.field(default_factory=dict)
    paper: dict[str, float] = dataclasses.field(default_factory=dict)
    """The paper's own metrics, the mean over the runs."""
    strata: dict[str, Estimate] = dataclasses.field(default_factory=dict)
    """Part of the records to top-1 accuracy there."""
    unread: dict[str, int] = dataclasses.field(default_factory=dict)
    """Reason to answers that could not be read, over all runs."""
    cost: Cost | None = None
    log_history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Of the first run."""
    unequal: list[str] = dataclasses.field(default_factory=list)
    """Keys in which it differs from what all should share."""
    error: str | None = None
    """Why there are no numbers."""

    @property
    def remark(self) -> str:
        """What stands beside the name, such as `control; 3 seeds`."""
        said: list[str] = [] if self.role == "method" else [self.role]
        said += [f"unequal: {', '.join(self.unequal)}"] if self.unequal else []
        said += [f"{self.runs} seeds"] if self.runs > 1 else []
        return "; ".join(said)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedTest:
    """One method tested against another."""

    first: str
    second: str
    difference: Difference
    adjusted: float
    """p after Holm's correction over all tests of the comparison."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confusion:
    """Another label named first where `truth` was right, and how often by each method, the mean over its runs."""

    truth: str
    named: str
    counts: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Disagreement:
    """A record that some methods got right and others wrong, and what each said, in its first run."""

    record_id: str
    prompt: str
    truth: str
    answers: dict[str, str]
    right: list[str]
    """Methods whose first name is the truth."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearDuplicate:
    """A held-out record and the record seen in training whose note is most like its own."""

    record_id: str
    seen_id: str
    similarity: float
    same_label: bool
    same_group: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeakCheck:
    """How like the held-out notes are to notes that were trained on or that picked a checkpoint."""

    compared: int
    """Held-out notes that were compared."""
    threshold: float
    median: float
    """Similarity to the most similar note, at the middle of the held-out records."""
    found: list[NearDuplicate]
    """Those at or above the threshold, the most alike first."""

    @property
    def sentence(self) -> str:
        """What was found, in one sentence."""
        if not self.compared:
            return "No notes to compare: the leak check says nothing."
        return (
            f"{len(self.found)} of {self.compared} held-out notes are at least {self.threshold:g} like a note of the "
            f"training or validation split (cosine of TF-IDF vectors; the median held-out note has {self.median:.2f})."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonSummary:
    """Everything that the report of a comparison shows."""

    title: str
    methods: list[MethodSummary]
    metric: str
    """What the paired tests are about."""
    confidence: float = 0.95
    tests: list[PairedTest] = dataclasses.field(default_factory=list)
    parts: dict[str, int] = dataclasses.field(default_factory=dict)
    """Part of the test records to how many there are in it."""
    confusions: list[Confusion] = dataclasses.field(default_factory=list)
    disagreements: list[Disagreement] = dataclasses.field(default_factory=list)
    leaks: LeakCheck | None = None
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    spec: dict[str, Any] = dataclasses.field(default_factory=dict)
    manifests: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Name of each artifact to its manifest, without the list of files."""

    @property
    def measured(self) -> list[MethodSummary]:
        """The methods that have numbers."""
        return [method for method in self.methods if method.error is None]

    @property
    def failed(self) -> list[MethodSummary]:
        """The methods that have none."""
        return [method for method in self.methods if method.error is not None]

    @property
    def tables(self) -> list[tuple[str, list[str]]]:
        """Headings and metrics of the tables, of metrics that some method has."""
        present = dict.fromkeys(name for method in self.measured for name in method.estimates)
        known = [(heading, [name for name in names if name in present]) for heading, names in TABLES]
        rest = [name for name in present if name not in METRICS]
        return [(heading, names) for heading, names in [*known, ("Other", rest)] if names]

    @property
    def paper_metrics(self) -> list[str]:
        return [name for name in PAPER_METRICS if any(name in method.paper for method in self.measured)]

    @property
    def interval(self) -> str:
        """What the brackets hold, such as `95 % interval`."""
        return f"{self.confidence * 100:g} % interval"


def show_p(p: float) -> str:
    """`0.034`, or `< 0.001`."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def show_difference(difference: Difference) -> str:
    """`+0.12 [+0.03, +0.21]`."""
    return f"{difference.value:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"


def show_share(share: float | None) -> str:
    """`0.43`, or `n/a` where there is no number."""
    return NOTHING if share is None else f"{share:.2f}"


def render_terminal(summary: ComparisonSummary) -> str:
    """The tables of metrics by method, the tests and the warnings; 100 columns, no colour codes."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    target = io.StringIO()
    # names come from users: brackets and colons in them are no markup and no emoji
    console = Console(
        file=target, width=WIDTH, force_terminal=False, color_system=None, markup=False, emoji=False, highlight=False
    )

    def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> None:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for number, heading in enumerate(headings):
            numeric = number >= words
            table.add_column(
                heading,
                justify="right" if numeric else "left",
                min_width=len("0.43 [0.31, 0.55]") if "[" in rows[0][number] else None,
                overflow="fold",
            )
        for row in rows:
            table.add_row(*row)
        console.print(table)

    console.print(summary.title)
    for heading, metrics in summary.tables:
        # as many columns as `0.43 [0.31, 0.55]` leaves room for
        for start in range(0, len(metrics), 4):
            some = metrics[start : start + 4]
            console.print(f"{heading} [{summary.interval}]")
            print_table(
                ["method", *map(title_of, some)],
                [
                    [_name(method), *(show(method.estimates.get(name)) for name in some)]
                    for method in summary.measured
                    if any(name in method.estimates for name in some)
                ],
            )
    if summary.tests:
        console.print(f"Paired permutation tests of {title_of(summary.metric).lower()}, p after Holm's correction")
        print_table(
            ["method", "against", f"difference [{summary.interval}]", "p", "p, Holm"],
            [
                [
                    test.first,
                    test.second,
                    show_difference(test.difference),
                    show_p(test.difference.p),
                    show_p(test.adjusted),
                ]
                for test in summary.tests
            ],
            words=2,
        )
    for method in summary.failed:
        console.print(f"failed: {_name(method)}: {method.error}")
    if summary.leaks:
        console.print(f"leak check: {summary.leaks.sentence}")
    for note in summary.notes:
        console.print(f"note: {note}")
    console.print(RESEARCH_USE)
    return "\n".join(line.rstrip() for line in target.getvalue().splitlines()) + "\n"


def render_markdown(summary: ComparisonSummary) -> str:
    """The page's twin in Markdown: every table of it."""
    from mint_ray.reports.text import escape, table

    lines = [f"# {escape(summary.title)}", "", RESEARCH_USE, ""]
    lines += [*(f"- {escape(note)}" for note in summary.notes), ""] if summary.notes else []
    for heading, metrics in summary.tables:
        rows = [
            [_name(method), *(show(method.estimates.get(name)) for name in metrics)]
            for method in summary.measured
            if any(name in method.estimates for name in metrics)
        ]
        lines += [f"## {heading}", "", *table([f"method [{summary.interval}]", *map(title_of, metrics)], rows), ""]
    if summary.failed:
        failed = [[_name(method), method.error or ""] for method in summary.failed]
        lines += ["## Methods that failed", "", *table(["method", "error"], failed, words=2), ""]
    if summary.tests:
        headings = ["method", "against", f"difference [{summary.interval}]", "p", "p, Holm"]
        tests = [
            [
                test.first,
                test.second,
                show_difference(test.difference),
                show_p(test.difference.p),
                show_p(test.adjusted),
            ]
            for test in summary.tests
        ]
        lines += [f"## Paired tests of {title_of(summary.metric).lower()}", "", *table(headings, tests, words=2), ""]
    if summary.parts:
        parts = [
            [f"{part} ({count:,})", *(show(method.strata.get(part)) for method in summary.measured)]
            for part, count in summary.parts.items()
        ]
        names = [method.name for method in summary.measured]
        lines += ["## Top-1 accuracy by part of the records", "", *table(["part (records)", *names], parts), ""]
    if summary.paper_metrics:
        paper = [
            [_name(method), *(show_share(method.paper.get(name)) for name in summary.paper_metrics)]
            for method in summary.measured
            if method.paper
        ]
        lines += [
            "## The paper's own metrics", "",
            "As its released code has them, with what is wrong with them; for setting beside its tables only.", "",
            *table(["method", *map(title_of, summary.paper_metrics)], paper), "",
        ]  # fmt: skip
    if summary.confusions:
        shown = [method for method in summary.measured if method.name in summary.confusions[0].counts]
        confused = [
            [row.truth, row.named, *(f"{row.counts[method.name]:.1f}" for method in shown)]
            for row in summary.confusions
        ]
        headings = ["truth", "named first", *(method.name for method in shown)]
        lines += ["## Most confused labels", "", *table(headings, confused, words=2), ""]
    costs = [method for method in summary.measured if method.cost]
    if costs:
        stages = list(dict.fromkeys(stage for method in costs if method.cost for stage in method.cost.seconds))
        rows = [
            [
                _name(method), f"{method.cost.pairs:,.0f}", f"{method.cost.tokens:,.0f}", f"{method.cost.steps:,.0f}",
                *(show_seconds(method.cost.seconds.get(stage, 0.0)) for stage in stages),
            ]
            for method in costs if method.cost
        ]  # fmt: skip
        lines += ["## Cost of a run", "", *table(["method", "pairs", "training tokens", "steps", *stages], rows), ""]
    for example in summary.disagreements:
        lines += [f"## Where they differ: {escape(example.truth)} (record {escape(example.record_id)})", ""]
        lines += [
            f"- {escape(name)} ({'right' if name in example.right else 'wrong'}): {escape(said) or '(empty)'}"
            for name, said in example.answers.items()
        ]
        lines.append("")
    if summary.leaks:
        lines += ["## Leak check", "", escape(summary.leaks.sentence), ""]
        rows = [
            [leak.record_id, leak.seen_id, _same(leak), f"{leak.similarity:.3f}"]
            for leak in summary.leaks.found[:SHOWN_LEAKS]
        ]
        lines += [*table(["held out", "seen in training", "same", "similarity"], rows, words=3), ""] if rows else []
    return "\n".join(lines)


def _same(leak: NearDuplicate) -> str:
    same = [what for what, is_same in (("label", leak.same_label), ("group", leak.same_group)) if is_same]
    return ", ".join(same) or "neither label nor group"


def _name(method: MethodSummary) -> str:
    return f"{method.name} ({method.remark})" if method.remark else method.name
