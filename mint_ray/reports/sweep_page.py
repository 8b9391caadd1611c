"""Report of a sweep as one self-contained HTML page.

The plots are drawn here rather than by `optuna.visualization`: its Plotly plots need a script, and its Matplotlib plots
distinguish trials by colour alone.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from mint_ray.reports import plots
from mint_ray.reports.formatting import format_setting
from mint_ray.reports.plots import BLUE, GREEN, INK, ORANGE
from mint_ray.reports.sweep import (
    SweepSummary,
    best_table,
    importance_table,
    pareto_front,
    seed_table,
    tested_table,
    trial_table,
    trials_sentence,
)
from mint_ray.reports.templates import render_page

MAX_NAME_LENGTH = 44
"""Characters of a parameter's name in a plot."""
MISSING_HEIGHT = -0.08
"""Position of a parameter that a trial does not have, below the smallest value (0)."""


def render_html(sweep: SweepSummary) -> str:
    """Render the page: inline style and plots, no scripts and no links."""
    return render_page(
        "sweep.html.j2",
        title=sweep.title,
        sweep=sweep,
        tested=tested_table(sweep),
        best=best_table(sweep),
        importance=importance_table(sweep),
        seeds=seed_table(sweep),
        trials=trial_table(sweep),
        sentence=trials_sentence(sweep),
        front=pareto_front(sweep.best, sweep.direction),
        forests=plots.drawn(
            ("Accuracy", plots.draw_forest(sweep.tested, plots.ACCURACIES, "Accuracy on the test split"))
        ),
        figures=plots.drawn(
            ("Importance", draw_importance(sweep)),
            ("Parameters and value", draw_parallel(sweep)),
            (f"{sweep.metric_title} against {sweep.unit}", draw_pareto(sweep)),
            (f"Validation {sweep.curve_metric} during training", draw_curves(sweep)),
            ("Finalists over training seeds", draw_seeds(sweep)),
        ),
        config=json.dumps(sweep.config, indent=2, ensure_ascii=False),
    )


def draw_importance(sweep: SweepSummary) -> str:
    """Return a bar per parameter, with another pattern for parameters of the data; empty if there is no importance."""
    shares = sweep.importance
    if not shares:
        return ""

    def draw(axes: Axes) -> None:
        labelled: set[str] = set()
        for index, (name, share) in enumerate(shares.items()):
            group = sweep.group_of(name)
            style: dict[str, Any] = {"facecolor": BLUE} if group == "data" else {"facecolor": "white", "hatch": "/////"}
            label = "" if group in labelled else group
            labelled.add(group)
            axes.barh(index + 0.16, share, height=0.34, edgecolor=INK, linewidth=0.8, label=label, **style)
            axes.text(0, index - 0.22, f"{_shorten(name)}  {share:.2f}", va="center", fontsize=9)
        axes.set_ylim(len(shares) - 0.4, -0.6)
        axes.set_yticks([])
        axes.set_xlim(0, 1)
        plots.add_legend(axes)

    return plots.render_figure(draw, height=0.9 + 0.5 * len(shares), title="Importance of every parameter")


def draw_parallel(sweep: SweepSummary) -> str:
    """Return parallel coordinates: a line per complete trial over its parameters and its value.

    The axes lie below each other, because parameters have long names and pages are narrow.
    """
    trials = sweep.best
    names = list(dict.fromkeys(name for trial in trials for name in trial.parameters))
    if len(trials) < 2 or not names:
        return ""
    columns = [[trial.parameters.get(name) for trial in trials] for name in names]
    columns.append([trial.value for trial in trials])
    heights = [_heights(column) for column in columns]

    def draw(axes: Axes) -> None:
        for index, trial in reversed(list(enumerate(trials))):
            is_winner = trial.number == sweep.winner
            axes.plot(
                [column[index] for column in heights], list(range(len(columns))),
                color=ORANGE if is_winner else BLUE, alpha=1.0 if is_winner else 0.35,
                linewidth=2.0 if is_winner else 1.0, marker="s" if is_winner else "o",
                markersize=4 if is_winner else 2.5,
                label=f"trial {trial.number}, the winner" if is_winner else "",
            )  # fmt: skip
        for index, name in enumerate([*names, f"{sweep.metric_title} (validation)"]):
            axes.axhline(index, color="#bbbbbb", linewidth=0.6, zorder=0)
            axes.text(0, index - 0.32, f"{_shorten(name)}: {_range(columns[index])}", va="center", fontsize=8)
        axes.set_ylim(len(names) + 0.3, -0.7)
        axes.set_xlim(-0.12, 1.04)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
        plots.add_legend(axes)

    return plots.render_figure(draw, height=1.0 + 0.5 * (len(names) + 1), title="Parameters and value of every trial")


def draw_pareto(sweep: SweepSummary) -> str:
    """Return value against cost of every complete trial, with the Pareto front."""
    trials = sweep.best
    if not trials:
        return ""
    front = pareto_front(trials, sweep.direction)

    def draw(axes: Axes) -> None:
        others = [trial for trial in trials if trial not in front]
        axes.plot(
            [trial.worker_seconds for trial in others], [trial.value or 0.0 for trial in others],
            linestyle="none", marker="o", color=BLUE, markerfacecolor="white", label="trial" if others else "",
        )  # fmt: skip
        axes.plot(
            [trial.worker_seconds for trial in front], [trial.value or 0.0 for trial in front],
            linestyle="--", marker="s", color=ORANGE, label="Pareto front",
        )  # fmt: skip
        for trial in front:
            place = (trial.worker_seconds, trial.value or 0.0)
            axes.annotate(str(trial.number), place, (4, -10), textcoords="offset points")
        axes.set_xlabel(sweep.unit)
        axes.set_ylabel(f"{sweep.metric_title} (validation)")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        plots.add_legend(axes)

    return plots.render_figure(draw, height=3.2, title=f"Metric against {sweep.unit}")


def draw_curves(sweep: SweepSummary) -> str:
    """Return the validation metric over the steps of every trial; pruned trials end early."""
    trials = [trial for trial in sweep.trials if trial.curve]
    if not trials:
        return ""

    def draw(axes: Axes) -> None:
        labelled: set[str] = set()
        styles: dict[str, dict[str, Any]] = {
            "complete": {"color": BLUE, "linestyle": "-", "marker": "o"},
            "pruned": {"color": ORANGE, "linestyle": "--", "marker": "x"},
            "failed or interrupted": {"color": GREEN, "linestyle": ":", "marker": "^"},
        }
        for trial in trials:
            state = trial.state if trial.state in styles else "failed or interrupted"
            steps, values = zip(*sorted(trial.curve), strict=True)
            label = "" if state in labelled else state
            labelled.add(state)
            axes.plot(steps, values, markersize=4, linewidth=1.0, alpha=0.8, label=label, **styles[state])
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
        axes.set_ylabel(sweep.curve_metric)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        plots.add_legend(axes)

    return plots.render_figure(draw, height=3.0, title=f"Validation {sweep.curve_metric} over steps")


def draw_seeds(sweep: SweepSummary) -> str:
    """Return the values of the finalists with each training seed, their ranges and means; empty without seeds."""
    finalists = {number: values for number, values in sweep.seeds.items() if len(values) > 1}
    if not finalists:
        return ""

    def draw(axes: Axes) -> None:
        for index, values in enumerate(finalists.values()):
            axes.plot([min(values), max(values)], [index, index], color=INK, linewidth=1.0)
            axes.plot(
                values, [index] * len(values), linestyle="none", marker="o", color=BLUE, label="" if index else "seed"
            )
            axes.plot(
                [statistics.fmean(values)], [index], linestyle="none", marker="|", markersize=16, color=ORANGE,
                label="" if index else "mean",
            )  # fmt: skip
        if sweep.default_value is not None:
            axes.axvline(sweep.default_value, color=INK, linestyle=":", linewidth=1.0, label="default, one seed")
        axes.set_yticks(range(len(finalists)), [f"trial {number}" for number in finalists])
        axes.set_ylim(len(finalists) - 0.5, -0.5)
        axes.set_xlabel(f"{sweep.metric_title} (validation)")
        plots.add_legend(axes)

    return plots.render_figure(draw, height=1.4 + 0.4 * len(finalists), title="Finalists over training seeds")


def _shorten(name: str) -> str:
    # the end of a dotted path is more specific than its beginning
    return name if len(name) <= MAX_NAME_LENGTH else f"… {name[-MAX_NAME_LENGTH:]}"


def _heights(values: list[Any]) -> list[float]:
    """Return the position of each value between the smallest (0) and the largest (1)."""
    known = [value for value in values if value is not None]
    if _are_numbers(known):
        low, high = min(known, default=0.0), max(known, default=0.0)
        return [
            MISSING_HEIGHT if value is None else (value - low) / (high - low) if high > low else 0.5 for value in values
        ]
    order = sorted(set(map(str, known)))
    last = max(len(order) - 1, 1)
    return [MISSING_HEIGHT if value is None else order.index(str(value)) / last for value in values]


def _range(values: list[Any]) -> str:
    known = [value for value in values if value is not None]
    if known and _are_numbers(known):
        return f"{format_setting(min(known))} to {format_setting(max(known))}"
    return ", ".join(sorted(set(map(str, known))))


def _are_numbers(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
