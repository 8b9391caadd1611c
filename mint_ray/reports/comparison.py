"""Everything that the report of a comparison shows, its tables, and its forms as plain text and Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from mint_ray.metrics import METRICS, PAPER_METRICS, Difference, Estimate
from mint_ray.records import MODE_SUFFIXES, Method
from mint_ray.reports import tables
from mint_ray.reports.formatting import (
    RESEARCH_USE,
    find_k,
    format_difference,
    format_level,
    format_p,
    format_seconds,
    format_share,
    metric_title,
)
from mint_ray.reports.tables import Cell, Table, escape, estimate_cell, make_table

Role = Literal["ceiling", "baseline", "method", "control"]

RESULT_TABLES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Accuracy", ("top_1_accuracy", "top_k_accuracy", "mean_reciprocal_rank", "macro_top_1_accuracy")),
    (
        "Hallucinated labels, and agreement with the teacher's ranking",
        ("hallucination_free_accuracy", "hallucination_rate", "readable", "coverage", "avoidance", "car"),
    ),
    ("Calibration of label rankings", ("expected_calibration_error", "brier_score")),
)
"""Heading and metrics of the result tables, each narrow enough for a page."""

MAX_NEAR_DUPLICATES = 20
"""Number of near-duplicates that the report lists."""


def row_key(name: str | None, method: Method) -> str:
    """Return the unique key of a row: that of `method` for teacher and base student, else name and mode."""
    return method.key if name is None else f"{name}/{method.mode}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of a method, the mean over its runs."""

    pairs: float
    """Training pairs."""
    tokens: float
    """Training tokens."""
    steps: float
    """Optimizer steps."""
    seconds: dict[str, float]
    """Stage to wall-clock seconds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One row of the comparison: a method in one mode, or the shared teacher or base student."""

    name: str | None
    """Name of the method in the comparison; None for the shared teacher and base student."""
    method: Method
    """Model that answered, and how it answered."""
    role: Role
    runs: int
    """Number of runs, one per seed; 1 for a model that is not trained."""
    estimates: dict[str, Estimate] = dataclasses.field(default_factory=dict)
    paper: dict[str, float] = dataclasses.field(default_factory=dict)
    """Metrics of the paper's evaluator, the mean over the runs."""
    subgroups: dict[str, Estimate] = dataclasses.field(default_factory=dict)
    """Subgroup of the records to top-1 accuracy."""
    unparsed: dict[str, int] = dataclasses.field(default_factory=dict)
    """Reason to the number of answers that could not be parsed, over all runs."""
    cost: Cost | None = None
    log_history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Log rows of the first run's training."""
    differences: list[str] = dataclasses.field(default_factory=list)
    """Settings in which the method differs although all methods should share them."""
    error: str | None = None
    """Error of a failed method, which has no estimates."""

    @property
    def key(self) -> str:
        """Unique key of the row."""
        return row_key(self.name, self.method)

    @property
    def title(self) -> str:
        """Name of the row for people."""
        return self.method.title if self.name is None else f"{self.name}{MODE_SUFFIXES[self.method.mode]}"

    @property
    def remark(self) -> str:
        """Remark behind the title, such as `(control; 3 seeds)`."""
        parts: list[str] = [] if self.role == "method" else [self.role]
        parts += [f"differs in {', '.join(self.differences)}"] if self.differences else []
        parts += [f"{self.runs} seeds"] if self.runs > 1 else []
        return f"({'; '.join(parts)})" if parts else ""

    @property
    def cell(self) -> Cell:
        """Title and remark."""
        return Cell(self.title, self.remark)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedTest:
    """Paired test of two rows."""

    first: str
    """Key of a row; the difference is first minus second."""
    second: str
    difference: Difference
    adjusted_p: float
    """p-value after Holm's correction over all tests of the comparison."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confusion:
    """A pair of labels that are confused."""

    truth: str
    predicted: str
    """Label that was named first in place of the truth."""
    counts: dict[str, float]
    """Key of a row to the number of records, the mean over its runs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Disagreement:
    """A record that some rows answer rightly and others wrongly, with the answers of their first runs."""

    record_id: str
    prompt: str
    truth: str
    answers: dict[str, str]
    """Key of a row to its answer."""
    correct: list[str]
    """Keys of the rows whose first name is the truth."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearDuplicate:
    """A test record, and the training or validation record with the most similar note."""

    record_id: str
    seen_id: str
    similarity: float
    same_label: bool
    same_group: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearDuplicateCheck:
    """Similarity of the test notes to training and validation notes."""

    compared: int
    """Number of test notes that were compared."""
    threshold: float
    median: float
    """Median over the test notes of the similarity to the most similar note."""
    found: list[NearDuplicate]
    """Near-duplicates at or above the threshold, the most similar first."""

    @property
    def sentence(self) -> str:
        """Result in one sentence."""
        if not self.compared:
            return "Near-duplicates: there are no notes to compare."
        return (
            f"Near-duplicates: {len(self.found)} of {self.compared} test notes have a similarity of at least "
            f"{self.threshold:g} to a training or validation note (cosine of TF-IDF vectors; median {self.median:.2f})."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonSummary:
    """Everything that the report of a comparison shows."""

    title: str
    rows: list[ComparisonRow]
    metric: str
    """Metric of the paired tests."""
    confidence: float = 0.95
    """Level of the intervals."""
    tests: list[PairedTest] = dataclasses.field(default_factory=list)
    subgroups: dict[str, int] = dataclasses.field(default_factory=dict)
    """Subgroup of the test records to its number of records."""
    confusions: list[Confusion] = dataclasses.field(default_factory=list)
    disagreements: list[Disagreement] = dataclasses.field(default_factory=list)
    near_duplicates: NearDuplicateCheck | None = None
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    """Remarks that a reader needs to interpret the numbers."""
    spec: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Resolved config of the comparison."""
    manifests: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Artifact to its manifest."""

    @property
    def measured(self) -> list[ComparisonRow]:
        """Rows that have estimates."""
        return [row for row in self.rows if row.error is None]

    @property
    def failed(self) -> list[ComparisonRow]:
        """Rows of methods that failed."""
        return [row for row in self.rows if row.error is not None]

    @property
    def k(self) -> int | None:
        """The k of top-k accuracy."""
        return find_k(row.estimates for row in self.rows)

    @property
    def metric_groups(self) -> list[tuple[str, list[str]]]:
        """Headings and metrics of the result tables, of metrics that some row has."""
        present = dict.fromkeys(name for row in self.measured for name in row.estimates)
        known = [(heading, [name for name in names if name in present]) for heading, names in RESULT_TABLES]
        other = [name for name in present if name not in METRICS]
        return [(heading, names) for heading, names in [*known, ("Other metrics", other)] if names]

    def titles(self) -> dict[str, str]:
        """Return the title of each row by its key."""
        return {row.key: row.title for row in self.rows}


def result_tables(summary: ComparisonSummary) -> list[Table]:
    """Return the tables of metrics (columns) by row."""
    return [
        make_table(
            [f"method [{format_level(summary.confidence)}]", *(metric_title(name, summary.k) for name in metrics)],
            [
                [row.cell, *(estimate_cell(row.estimates.get(name)) for name in metrics)]
                for row in summary.measured
                if any(name in row.estimates for name in metrics)
            ],
            title=heading,
        )
        for heading, metrics in summary.metric_groups
    ]


def failure_table(summary: ComparisonSummary) -> Table | None:
    """Return the table of failed methods and their errors."""
    rows: list[list[str | Cell]] = [[row.cell, row.error or ""] for row in summary.failed]
    return _table_if_rows(["method", "error"], rows, text_columns=(0, 1), title="Failed methods")


def paired_test_table(summary: ComparisonSummary) -> Table | None:
    """Return the table of paired tests."""
    titles = summary.titles()
    return _table_if_rows(
        ["method", "compared with", f"difference [{format_level(summary.confidence)}]", "p", "p (Holm)"],
        [
            [
                titles[test.first],
                titles[test.second],
                format_difference(test.difference),
                format_p(test.difference.p),
                format_p(test.adjusted_p),
            ]
            for test in summary.tests
        ],
        text_columns=(0, 1),
        title=f"Paired tests of {metric_title(summary.metric, summary.k).lower()}",
        note="Paired permutation tests over groups; two-sided p-values, without and with Holm's correction for all "
        f"{len(summary.tests)} tests.",
    )


def subgroup_table(summary: ComparisonSummary, subgroups: Iterable[str] | None = None) -> Table | None:
    """Return the table of top-1 accuracy by subgroup (columns), of all subgroups or of those given."""
    names = [name for name in subgroups or summary.subgroups if name in summary.subgroups]
    if not names:
        return None
    return _table_if_rows(
        [f"method [{format_level(summary.confidence)}]", *(f"{name} ({summary.subgroups[name]:,})" for name in names)],
        [[row.cell, *(estimate_cell(row.subgroups.get(name)) for name in names)] for row in summary.measured],
        title="Top-1 accuracy by subgroup",
    )


def paper_table(summary: ComparisonSummary) -> Table | None:
    """Return the table of the metrics of the paper's evaluator."""
    metrics = [name for name in PAPER_METRICS if any(name in row.paper for row in summary.measured)]
    return _table_if_rows(
        ["method", *map(metric_title, metrics)],
        [[row.cell, *(format_share(row.paper.get(name)) for name in metrics)] for row in summary.measured if row.paper],
        title="Metrics of the paper's evaluator",
        note="As computed by the evaluator released with the paper, including its errors; only for comparison with the "
        "paper's tables.",
    )


def confusion_table(summary: ComparisonSummary) -> Table | None:
    """Return the table of the most confused labels, by row (columns)."""
    titles = summary.titles()
    keys = list(summary.confusions[0].counts) if summary.confusions else []
    return _table_if_rows(
        ["truth", "named first", *(titles[key] for key in keys)],
        [
            [confusion.truth, confusion.predicted, *(f"{confusion.counts[key]:.1f}" for key in keys)]
            for confusion in summary.confusions
        ],
        text_columns=(0, 1),
        title="Most confused labels",
    )


def cost_table(summary: ComparisonSummary) -> Table | None:
    """Return the table of costs."""
    costs = [(row, row.cost) for row in summary.measured if row.cost]
    stages = list(dict.fromkeys(stage for _, cost in costs for stage in cost.seconds))
    return _table_if_rows(
        ["method", "pairs", "training tokens", "steps", *stages],
        [
            [
                row.cell,
                f"{cost.pairs:,.0f}",
                f"{cost.tokens:,.0f}",
                f"{cost.steps:,.0f}",
                *(format_seconds(cost.seconds.get(stage, 0.0)) for stage in stages),
            ]
            for row, cost in costs
        ],
        title="Cost of a run",
        note="Wall clock, the mean over the runs. Artifacts that several methods share are counted for each of them.",
    )


def near_duplicate_table(summary: ComparisonSummary) -> Table | None:
    """Return the table of the most similar near-duplicates."""
    found = summary.near_duplicates.found if summary.near_duplicates else []
    note = f"The first {MAX_NEAR_DUPLICATES} of {len(found)}; all of them are in comparison.json."
    return _table_if_rows(
        ["test record", "training or validation record", "same", "similarity"],
        [
            [match.record_id, match.seen_id, _same(match), f"{match.similarity:.3f}"]
            for match in found[:MAX_NEAR_DUPLICATES]
        ],
        text_columns=(0, 1, 2),
        title="Near-duplicates",
        note=note if len(found) > MAX_NEAR_DUPLICATES else "",
    )


def render_terminal(summary: ComparisonSummary) -> str:
    """Render metrics, tests and warnings as plain text."""
    tests = paired_test_table(summary)
    return tables.render_text(
        [
            summary.title,
            *result_tables(summary),
            *([tests] if tests else []),
            *(f"failed: {row.cell}: {row.error}" for row in summary.failed),
            *([summary.near_duplicates.sentence] if summary.near_duplicates else []),
            *(f"note: {note}" for note in summary.notes),
            RESEARCH_USE,
        ]
    )


def render_markdown(summary: ComparisonSummary) -> str:
    """Render every table of the page as Markdown."""
    notes = "\n".join(f"- {escape(note)}" for note in summary.notes)
    blocks: list[str | Table | None] = [
        f"# {escape(summary.title)}",
        RESEARCH_USE,
        notes or None,
        *result_tables(summary),
        failure_table(summary),
        paired_test_table(summary),
        subgroup_table(summary),
        paper_table(summary),
        confusion_table(summary),
        cost_table(summary),
        *_disagreement_blocks(summary),
        escape(summary.near_duplicates.sentence) if summary.near_duplicates else None,
        near_duplicate_table(summary),
    ]
    return tables.render_markdown(block for block in blocks if block is not None)


def answers_of(summary: ComparisonSummary, disagreement: Disagreement) -> list[tuple[str, str]]:
    """Return heading, such as `orpo: right`, and answer of each row."""
    titles = summary.titles()
    return [
        (f"{titles[key]}: {'right' if key in disagreement.correct else 'wrong'}", answer)
        for key, answer in disagreement.answers.items()
    ]


def _disagreement_blocks(summary: ComparisonSummary) -> list[str]:
    blocks = []
    for each in summary.disagreements:
        blocks.append(f"## Disagreement: {escape(each.truth)} (record {escape(each.record_id)})")
        answers = answers_of(summary, each)
        blocks.append("\n".join(f"- {escape(heading)}: {escape(answer) or '(empty)'}" for heading, answer in answers))
    return blocks


def _table_if_rows(headings: Sequence[str], rows: Sequence[Sequence[str | Cell]], **options: Any) -> Table | None:
    return make_table(headings, rows, **options) if rows else None


def _same(match: NearDuplicate) -> str:
    same = [what for what, is_same in (("label", match.same_label), ("group", match.same_group)) if is_same]
    return ", ".join(same) or "neither label nor group"
