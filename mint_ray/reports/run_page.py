"""Report of one run as one self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping

from mint_ray.reports import plots
from mint_ray.reports.formatting import describe_metrics, find_k, format_level, format_seconds, order_metrics
from mint_ray.reports.goodput import goodput_table
from mint_ray.reports.summary import RunSummary
from mint_ray.reports.tables import Table, make_table
from mint_ray.reports.templates import render_page
from mint_ray.reports.text import results_table

MAX_LABELS = 30
"""Number of labels that are plotted, the most frequent ones."""
LABELS_PER_PLOT = 15
HISTORIES = (
    ("Loss", "loss"),
    ("Log odds ratio of chosen to rejected", "log_odds_ratio"),
    ("Reward accuracy", "rewards/accuracies"),
)
"""Caption and key of the training metrics that are plotted."""


def render_html(run: RunSummary) -> str:
    """Render the page: inline style and plots, no scripts and no links."""
    estimates, k = run.estimates, find_k(run.estimates.values())
    # the most frequent labels; equally frequent ones by name, so that the order is reproducible
    labels = sorted(run.per_label, key=lambda label: (-label.n, label.name))[:MAX_LABELS]
    hits = f"Right among the first {k or 'k'} names, by label"
    return render_page(
        "run.html.j2",
        title=run.title,
        run=run,
        k=k or "k",
        interval=format_level(run.confidence),
        results=results_table(estimates, run.confidence),
        definitions=describe_metrics(order_metrics(estimates.values()), k),
        forests=plots.drawn(
            ("Accuracy", plots.draw_forest(estimates, plots.ACCURACIES, "Accuracy by method")),
            (
                "Agreement with the teacher's ranking",
                plots.draw_forest(estimates, plots.AGREEMENTS, "Coverage, avoidance and CAR by method"),
            ),
        ),
        histories=plots.drawn(
            *(
                (caption, plots.draw_history(run.log_history, key, f"{caption} over steps"))
                for caption, key in HISTORIES
            )
        ),
        label_plots=plots.drawn(
            *(
                ("", plots.draw_labels(labels[start : start + LABELS_PER_PLOT], hits))
                for start in range(0, len(labels), LABELS_PER_PLOT)
            )
        ),
        labels=labels,
        counts=count_tables(run.counts),
        dropped=count_tables(run.dropped),
        times=_times(run.seconds),
        resources=goodput_table(run.goodput),
        config=json.dumps(run.config, indent=2, ensure_ascii=False),
    )


def count_tables(groups: Mapping[str, Mapping[str, int]]) -> list[Table]:
    """Return one table per group, headed by its name, of names and numbers."""
    return [
        make_table([group, "rows"], [[name, f"{number:,}"] for name, number in numbers.items()])
        for group, numbers in groups.items()
        if numbers
    ]


def _times(seconds: Mapping[str, float]) -> Table | None:
    if not seconds:
        return None
    rows = [[stage, format_seconds(took)] for stage, took in seconds.items()]
    return make_table(["stage", "wall clock"], [*rows, ["total", format_seconds(sum(seconds.values()))]])
