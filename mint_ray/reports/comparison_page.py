"""Write a comparison as one self-contained HTML page."""

from __future__ import annotations

import json
from typing import Any

from mint_ray.metrics.subgroups import AGE_BANDS
from mint_ray.reports import comparison, plots, summary
from mint_ray.reports.comparison import ComparisonSummary, MethodSummary
from mint_ray.reports.templates import render_page

_METHODS_PER_PLOT = 12
_PARTS = (
    ("By how often a label was there to train on", ("rare labels", "frequent labels")),
    ("By sex", ("female", "male", "sex unknown")),
    ("By age", (*(band for _, band in AGE_BANDS), "age unknown")),
)


def render_html(comparison_summary: ComparisonSummary) -> str:
    """The page: inline style and plots, no script, no address that a browser would ask for anything."""
    run = comparison_summary

    def titles(metrics: list[str]) -> list[str]:
        return [summary.title_of(metric) for metric in metrics]

    def counted(parts: list[str]) -> list[str]:
        return [f"{part} ({run.parts[part]:,})" for part in parts]

    def measured_in(method: MethodSummary, metrics: list[str]) -> bool:
        return any(metric in method.estimates for metric in metrics)

    costs = [method for method in run.measured if method.cost]
    parts = [(heading, [name for name in names if name in run.parts]) for heading, names in _PARTS]
    return render_page(
        "comparison.html.j2",
        show_difference=comparison.show_difference,
        show_p=comparison.show_p,
        show_share=comparison.show_share,
        titles=titles,
        counted=counted,
        measured_in=measured_in,
        run=run,
        meanings=summary.MEANINGS,
        parts=[(heading, names) for heading, names in parts if names],
        forests=_draw_forests(run),
        histories=_draw_histories(run),
        costs=costs,
        stages=list(dict.fromkeys(stage for method in costs if method.cost for stage in method.cost.seconds)),
        unread={
            f"{method.name}: {reason}": count for method in run.measured for reason, count in method.unread.items()
        },
        shown_leaks=comparison.SHOWN_LEAKS,
        spec=json.dumps(run.spec, indent=2, ensure_ascii=False),
        manifests=json.dumps(run.manifests, indent=1, ensure_ascii=False),
    )


def _draw_forests(run: ComparisonSummary) -> list[tuple[str, str]]:
    """Captions and plots, of so many methods each that a phone shows one whole."""
    forests = []
    for start in range(0, len(run.measured), _METHODS_PER_PLOT):
        estimates = {method.name: method.estimates for method in run.measured[start : start + _METHODS_PER_PLOT]}
        for caption, metrics in (
            ("Accuracy", ("top_1_accuracy", "top_10_accuracy")),
            ("Coverage, avoidance and CAR", ("coverage", "avoidance", "car")),
        ):
            forests.append((caption, plots.draw_forest(estimates, metrics, f"{caption} by method, with intervals")))
    return [(caption, svg) for caption, svg in forests if svg]


def _draw_histories(run: ComparisonSummary) -> list[tuple[str, str]]:
    shown: list[tuple[str, str]] = []
    for method in run.measured:
        history: list[dict[str, Any]] = method.log_history
        for key, what in (("loss", "loss"), ("rewards/accuracies", "share of pairs ranked rightly")):
            shown.append(
                (f"{method.name}: {what}", plots.draw_history(history, key, f"{method.name}: {what} over steps"))
            )
    return [(caption, svg) for caption, svg in shown if svg]
