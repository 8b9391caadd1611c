"""Report of a comparison as one self-contained HTML page."""

from __future__ import annotations

import json

from mint_ray.metrics import PAPER_METRICS
from mint_ray.metrics.subgroups import AGE_BANDS
from mint_ray.reports import comparison, plots
from mint_ray.reports.comparison import ComparisonSummary
from mint_ray.reports.formatting import describe_metrics, format_level
from mint_ray.reports.run_page import count_tables
from mint_ray.reports.templates import render_page

ROWS_PER_PLOT = 12
SUBGROUPS = (
    ("By frequency of the label in training", ("rare labels", "frequent labels")),
    ("By sex", ("female", "male", "sex unknown")),
    ("By age", (*(band for _, band in AGE_BANDS), "age unknown")),
)
"""Headings and subgroups of the tables of top-1 accuracy."""


def render_html(summary: ComparisonSummary) -> str:
    """Render the page: inline style and plots, no scripts and no links."""
    paper = comparison.paper_table(summary)
    unparsed = {f"{row.title}: {reason}": n for row in summary.measured for reason, n in row.unparsed.items()}
    return render_page(
        "comparison.html.j2",
        title=summary.title,
        run=summary,
        interval=format_level(summary.confidence),
        results=comparison.result_tables(summary),
        failed=[f"{row.title}: {row.error}" for row in summary.failed],
        definitions=describe_metrics([name for _, names in summary.metric_groups for name in names], summary.k),
        forests=_forests(summary),
        tests=comparison.paired_test_table(summary),
        subgroups=[
            (heading, table)
            for heading, names in SUBGROUPS
            if (table := comparison.subgroup_table(summary, names)) is not None
        ],
        paper=paper,
        paper_definitions=describe_metrics(PAPER_METRICS) if paper else {},
        confusions=_confusions(summary),
        disagreements=[(each, comparison.answers_of(summary, each)) for each in summary.disagreements],
        histories=_histories(summary),
        costs=comparison.cost_table(summary),
        near_duplicates=comparison.near_duplicate_table(summary),
        counts=count_tables({"all methods": summary.counts}),
        dropped=count_tables({"reason": summary.dropped}),
        unparsed=count_tables({"method and reason": unparsed}),
        spec=json.dumps(summary.spec, indent=2, ensure_ascii=False),
        manifests=json.dumps(summary.manifests, indent=1, ensure_ascii=False),
    )


def _confusions(summary: ComparisonSummary) -> list[tuple[comparison.Confusion, str]]:
    """Return each confusion with its counts by row, in one line."""
    titles = summary.titles()
    return [
        (each, ", ".join(f"{titles[key]} {count:.1f}" for key, count in each.counts.items()))
        for each in summary.confusions
    ]


def _forests(summary: ComparisonSummary) -> list[tuple[str, str]]:
    """Return captions and plots, with few enough rows per plot for a phone."""
    forests = []
    for start in range(0, len(summary.measured), ROWS_PER_PLOT):
        estimates = {row.title: row.estimates for row in summary.measured[start : start + ROWS_PER_PLOT]}
        for caption, metrics in (("Accuracy", plots.ACCURACIES), ("Coverage, avoidance and CAR", plots.AGREEMENTS)):
            forests.append((caption, plots.draw_forest(estimates, metrics, f"{caption} by method, with intervals")))
    return plots.drawn(*forests)


def _histories(summary: ComparisonSummary) -> list[tuple[str, str]]:
    histories = []
    for row in summary.measured:
        for key, what in (("loss", "loss"), ("rewards/accuracies", "reward accuracy")):
            plot = plots.draw_history(row.log_history, key, f"{row.title}: {what} over steps")
            histories.append((f"{row.title}: {what}", plot))
    return plots.drawn(*histories)
