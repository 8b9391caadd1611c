"""Write a run's summary as one self-contained HTML page."""

from __future__ import annotations

import json

from mint_ray.reports import plots, summary
from mint_ray.reports.summary import RunSummary
from mint_ray.reports.templates import render_page

LABELS_SHOWN = 30
_LABELS_PER_PLOT = 15


def render_html(run: RunSummary) -> str:
    """The page: inline style and plots, no script, no address that a browser would ask for anything."""
    # the most frequent labels say most; equal ones by name, so that the order is the same each time
    labels = sorted(run.per_label, key=lambda label: (-label.n, label.name))[:LABELS_SHOWN]
    label_plots = [
        plots.draw_labels(labels[start : start + _LABELS_PER_PLOT], "Right among the first ten names, by label")
        for start in range(0, len(labels), _LABELS_PER_PLOT)
    ]
    forests = [
        (
            "Against the truth",
            plots.draw_forest(run.methods, ("top_1_accuracy", "top_10_accuracy"), "Accuracy by method"),
        ),
        (
            "Against the teacher's ranking",
            plots.draw_forest(run.methods, ("coverage", "avoidance", "car"), "Coverage, avoidance and CAR by method"),
        ),
    ]
    histories = [
        ("Loss", plots.draw_history(run.log_history, "loss", "Loss over steps")),
        (
            "Log odds ratio of chosen to rejected",
            plots.draw_history(run.log_history, "log_odds_ratio", "Log odds ratio over steps"),
        ),
        (
            "Share of pairs whose chosen answer is the likelier",
            plots.draw_history(run.log_history, "rewards/accuracies", "Share of pairs ranked rightly over steps"),
        ),
    ]
    return render_page(
        "run.html.j2",
        run=run,
        meanings=summary.MEANINGS,
        forests=[(caption, svg) for caption, svg in forests if svg],
        histories=[(caption, svg) for caption, svg in histories if svg],
        label_plots=[svg for svg in label_plots if svg],
        labels=labels,
        goodput_headings=summary.GOODPUT_HEADINGS,
        goodput_rows=summary.goodput_rows(run.goodput),
        goodput_meaning=summary.GOODPUT_MEANING,
        config=json.dumps(run.config, indent=2, ensure_ascii=False),
    )
