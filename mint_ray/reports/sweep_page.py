"""Write what a sweep found as one self-contained HTML page."""

from __future__ import annotations

import json
import statistics
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from mint_ray.reports import plots
from mint_ray.reports.plots import BLUE, GREEN, INK, ORANGE
from mint_ray.reports.summary import title_of
from mint_ray.reports.sweep import (
    LISTED,
    SweepSummary,
    pareto_front,
    show_changes,
    show_number,
    show_setting,
    side_of,
)
from mint_ray.reports.templates import render_page

_LETTERS = 44


def render_html(sweep: SweepSummary) -> str:
    """The page: inline style and plots, no script, no address that a browser would ask for anything."""
    figures = [
        ("What mattered", draw_importance(sweep)),
        ("Every trial", draw_parallel(sweep)),
        (f"Quality against {sweep.unit}", draw_pareto(sweep)),
        (f"Validation {sweep.curve_metric} during training", draw_curves(sweep)),
        ("The best with several training seeds", draw_seeds(sweep)),
    ]
    return render_page(
        "sweep.html.j2",
        show_changes=show_changes,
        show_number=show_number,
        sweep=sweep,
        best=sweep.best[:LISTED],
        front=pareto_front(sweep.best, sweep.direction),
        figures=[(caption, svg) for caption, svg in figures if svg],
        forest=plots.draw_forest(sweep.methods, ("top_1_accuracy", "top_10_accuracy"), "Accuracy on the test split"),
        metrics=list(dict.fromkeys(metric for found in sweep.methods.values() for metric in found)),
        config=json.dumps(sweep.config, indent=2, ensure_ascii=False),
    )


def draw_importance(sweep: SweepSummary) -> str:
    """A bar for each parameter, data-side ones apart in colour; empty where nothing was weighed."""
    shares = sweep.importance
    if not shares:
        return ""

    def draw(axes: Axes) -> None:
        labelled: set[str] = set()
        for place, (name, share) in enumerate(shares.items()):
            side = side_of(sweep, name)
            style: dict[str, Any] = {"facecolor": BLUE} if side == "data" else {"facecolor": "white", "hatch": "/////"}
            label = "" if side in labelled else side
            labelled.add(side)
            axes.barh(place + 0.16, share, height=0.34, edgecolor=INK, linewidth=0.8, label=label, **style)
            axes.text(0, place - 0.22, f"{_cut(name)}  {share:.2f}", va="center", fontsize=9)
        axes.set_ylim(len(shares) - 0.4, -0.6)
        axes.set_yticks([])
        axes.set_xlim(0, 1)
        plots.add_legend(axes)

    return plots.render_figure(draw, height=0.9 + 0.5 * len(shares), title="Importance of every parameter")


def draw_parallel(sweep: SweepSummary) -> str:
    """A line for each trial that ran to its end, over its parameters to its value; one that lacks a parameter passes
    below."""
    rows = sweep.best
    names = list(dict.fromkeys(name for row in rows for name in row.parameters))
    if len(rows) < 2 or not names:
        return ""
    heights = [_heights([row.parameters.get(name) for row in rows]) for name in names]
    values = _heights([row.value for row in rows])

    def draw(axes: Axes) -> None:
        # one axis lies below the other: names of parameters are long, and pages narrow
        places = list(range(len(names) + 1))
        for index, row in reversed(list(enumerate(rows))):
            along = [*(column[index] for column in heights), values[index]]
            first = row.number == sweep.winner
            axes.plot(
                along, places, color=ORANGE if first else BLUE, alpha=1.0 if first else 0.35,
                linewidth=2.0 if first else 1.0, marker="s" if first else "o", markersize=4 if first else 2.5,
                label=f"trial {row.number}, the winner" if first else "",
            )  # fmt: skip
        for place, name in enumerate([*names, f"{title_of(sweep.metric)} (validation)"]):
            shown = [row.parameters.get(name) for row in rows] if place < len(names) else [row.value for row in rows]
            axes.axhline(place, color="#bbbbbb", linewidth=0.6, zorder=0)
            axes.text(0, place - 0.32, f"{_cut(name)}: {_ends(shown)}", va="center", fontsize=8)
        axes.set_ylim(len(names) + 0.3, -0.7)
        axes.set_xlim(-0.12, 1.04)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
        plots.add_legend(axes)

    return plots.render_figure(draw, height=1.0 + 0.5 * (len(names) + 1), title="Parameters and value of every trial")


def draw_pareto(sweep: SweepSummary) -> str:
    """Value against cost of every trial that ran to its end, and the front of those that none beats in both."""
    rows = sweep.best
    if not rows:
        return ""
    front = pareto_front(rows, sweep.direction)

    def draw(axes: Axes) -> None:
        others = [row for row in rows if row not in front]
        axes.plot(
            [row.worker_seconds for row in others], [row.value or 0.0 for row in others],
            linestyle="none", marker="o", color=BLUE, markerfacecolor="white", label="trial" if others else "",
        )  # fmt: skip
        axes.plot(
            [row.worker_seconds for row in front], [row.value or 0.0 for row in front],
            linestyle="--", marker="s", color=ORANGE, label="not beaten in both",
        )  # fmt: skip
        for row in front:
            axes.annotate(str(row.number), (row.worker_seconds, row.value or 0.0), (4, -10), textcoords="offset points")
        axes.set_xlabel(sweep.unit)
        axes.set_ylabel(f"{title_of(sweep.metric)} (validation)")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        plots.add_legend(axes)

    return plots.render_figure(draw, height=3.2, title=f"Quality against {sweep.unit}")


def draw_curves(sweep: SweepSummary) -> str:
    """The validation metric over the steps of every trial; trials that were given up end early."""
    rows = [row for row in sweep.trials if row.curve]
    if not rows:
        return ""

    def draw(axes: Axes) -> None:
        labelled: set[str] = set()
        styles: dict[str, dict[str, Any]] = {
            "ran to its end": {"color": BLUE, "linestyle": "-", "marker": "o"},
            "given up": {"color": ORANGE, "linestyle": "--", "marker": "x"},
            "raised or cut off": {"color": GREEN, "linestyle": ":", "marker": "^"},
        }
        for row in rows:
            ended = {"complete": "ran to its end", "pruned": "given up"}.get(row.state, "raised or cut off")
            steps, values = zip(*sorted(row.curve), strict=True)
            label = "" if ended in labelled else ended
            labelled.add(ended)
            axes.plot(steps, values, markersize=4, linewidth=1.0, alpha=0.8, label=label, **styles[ended])
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
        axes.set_ylabel(sweep.curve_metric)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        plots.add_legend(axes)

    return plots.render_figure(draw, height=3.0, title=f"Validation {sweep.curve_metric} over steps")


def draw_seeds(sweep: SweepSummary) -> str:
    """The value of the best trials with each training seed, and the span from least to most; empty without seeds."""
    several = {number: values for number, values in sweep.seeds.items() if len(values) > 1}
    if not several:
        return ""

    def draw(axes: Axes) -> None:
        for place, values in enumerate(several.values()):
            axes.plot([min(values), max(values)], [place, place], color=INK, linewidth=1.0)
            axes.plot(
                values, [place] * len(values), linestyle="none", marker="o", color=BLUE, label="" if place else "seed"
            )
            axes.plot(
                [statistics.fmean(values)], [place], linestyle="none", marker="|", markersize=16, color=ORANGE,
                label="" if place else "mean",
            )  # fmt: skip
        if sweep.default_value is not None:
            axes.axvline(sweep.default_value, color=INK, linestyle=":", linewidth=1.0, label="default, one seed")
        axes.set_yticks(range(len(several)), [f"trial {number}" for number in several])
        axes.set_ylim(len(several) - 0.5, -0.5)
        axes.set_xlabel(f"{title_of(sweep.metric)} (validation)")
        plots.add_legend(axes)

    return plots.render_figure(draw, height=1.4 + 0.4 * len(several), title="The best trials over training seeds")


def _cut(name: str) -> str:
    # the end tells more than the sections before it
    return name if len(name) <= _LETTERS else f"… {name[-_LETTERS:]}"


def _heights(values: list[Any]) -> list[float]:
    """Where each value stands between the least (0) and the most (1); -0.08 for one that is not there."""
    known = [value for value in values if value is not None]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
        low, high = min(known, default=0.0), max(known, default=0.0)
        return [-0.08 if value is None else (value - low) / (high - low) if high > low else 0.5 for value in values]
    order = list(dict.fromkeys(sorted(map(str, known))))
    most = max(len(order) - 1, 1)
    return [-0.08 if value is None else order.index(str(value)) / most for value in values]


def _ends(values: list[Any]) -> str:
    known = [value for value in values if value is not None]
    if known and all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
        return f"{show_setting(min(known))} to {show_setting(max(known))}"
    return ", ".join(dict.fromkeys(sorted(map(str, known))))
