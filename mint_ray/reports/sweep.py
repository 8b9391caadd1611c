"""Show what a sweep tried, what mattered, and what the best spec is worth."""

from __future__ import annotations

import dataclasses
import io
import json
import statistics
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table

from mint_ray.metrics import Estimate
from mint_ray.reports import plots, summary
from mint_ray.reports.plots import BLUE, GREEN, INK, ORANGE
from mint_ray.reports.summary import NOTHING, RESEARCH_USE, show_seconds, title_of
from mint_ray.reports.text import WIDTH, escape

LISTED = 10
"""Trials in the table of the best."""
_LETTERS = 44


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One trial as it ended."""

    number: int
    state: str
    """`complete`, `pruned` (given up), `fail` (raised) or `running` (cut off)."""
    value: float | None
    """The metric on the validation split; None unless the trial ran to its end."""
    parameters: dict[str, Any]
    """What was drawn, by parameter."""
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the spec says instead, by dotted path."""
    curve: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    """Step and validation metric of training."""
    worker_seconds: float = 0.0
    """Wall clock of the trial times its training workers, over all attempts."""
    wall_seconds: float = 0.0
    """From start to end, with whatever lay between two runs of the sweep."""
    error: str | None = None
    artifacts: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepSummary:
    """Everything that the report of a sweep shows."""

    title: str
    metric: str
    direction: str
    trials: list[TrialRow]
    importance: dict[str, float]
    """Parameter to its share, most first."""
    data_side: list[str]
    """Parameters that decide what the student is taught."""
    curve_metric: str
    """The metric of `TrialRow.curve`."""
    default_value: float | None
    """What the spec comes to as it stands, on the same split as the trials."""
    seeds: dict[int, list[float]]
    """Trial to its values with each training seed, its own first."""
    winner: int
    methods: dict[str, dict[str, Estimate]]
    """On the test split: default and winner."""
    confidence: float = 0.95
    workers: int = 1
    gpus: bool = False
    prunes: bool = False
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    study: str = ""

    @property
    def best(self) -> list[TrialRow]:
        """Trials that ran to their end, best first."""
        sign = -1 if self.direction == "maximize" else 1
        done = [trial for trial in self.trials if trial.value is not None]
        return sorted(done, key=lambda trial: (sign * (trial.value or 0.0), trial.number))

    @property
    def unit(self) -> str:
        return "GPU-seconds" if self.gpus else "worker-seconds"

    @property
    def states(self) -> dict[str, int]:
        states = [trial.state for trial in self.trials]
        return {state: states.count(state) for state in dict.fromkeys(states)}

    @property
    def saved_seconds(self) -> float | None:
        """What trials that were given up would have cost more, had they cost what a whole one does on average."""
        whole = [trial.worker_seconds for trial in self.trials if trial.state == "complete"]
        given_up = [trial.worker_seconds for trial in self.trials if trial.state == "pruned"]
        if not whole or not given_up:
            return None
        return statistics.fmean(whole) * len(given_up) - sum(given_up)


def pareto_front(trials: list[TrialRow], direction: str) -> list[TrialRow]:
    """Trials that no other beats both in value and in cost, cheapest first."""
    sign = -1 if direction == "maximize" else 1
    front: list[TrialRow] = []
    for trial in sorted(trials, key=lambda trial: (trial.worker_seconds, sign * (trial.value or 0.0), trial.number)):
        if not front or sign * (trial.value or 0.0) < sign * (front[-1].value or 0.0):
            front.append(trial)
    return front


def render_html(sweep: SweepSummary) -> str:
    """The page: inline style and plots, no script, no address that a browser would ask for anything."""
    environment = Environment(
        loader=PackageLoader("mint_ray.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        title_of=summary.title_of,
        show_value=summary.show_value,
        show_interval=summary.show_interval,
        show_seconds=summary.show_seconds,
        show_changes=show_changes,
        show_number=show_number,
    )
    figures = [
        ("What mattered", draw_importance(sweep)),
        ("Every trial", draw_parallel(sweep)),
        (f"Quality against {sweep.unit}", draw_pareto(sweep)),
        (f"Validation {sweep.curve_metric} during training", draw_curves(sweep)),
        ("The best with several training seeds", draw_seeds(sweep)),
    ]
    return environment.get_template("sweep.html.j2").render(
        sweep=sweep,
        best=sweep.best[:LISTED],
        front=pareto_front(sweep.best, sweep.direction),
        research_use=RESEARCH_USE,
        figures=[(caption, svg) for caption, svg in figures if svg],
        forest=plots.draw_forest(sweep.methods, ("top_1_accuracy", "top_10_accuracy"), "Accuracy on the test split"),
        metrics=list(dict.fromkeys(metric for found in sweep.methods.values() for metric in found)),
        config=json.dumps(sweep.config, indent=2, ensure_ascii=False),
    )


def render_markdown(sweep: SweepSummary) -> str:
    """The same as tables."""
    lines = [f"## {escape(sweep.title)}", "", escape(_counted(sweep)), ""]
    lines += [f"| trial | {escape(title_of(sweep.metric))} | {sweep.unit} | what it changes |", "|---:|---:|---:|---|"]
    lines += [
        f"| {row.number} | {show_number(row.value)} | {row.worker_seconds:.0f} | {escape(show_changes(row.changes))} |"
        for row in sweep.best[:LISTED]
    ]
    if sweep.default_value is not None:
        lines.append(f"| default | {show_number(sweep.default_value)} | | |")
    if sweep.importance:
        lines += ["", "| parameter | side | importance |", "|---|---|---:|"]
        lines += [
            f"| {escape(name)} | {_side(sweep, name)} | {share:.2f} |" for name, share in sweep.importance.items()
        ]
    if any(len(values) > 1 for values in sweep.seeds.values()):
        lines += ["", "| trial | seeds | mean | least | most |", "|---:|---:|---:|---:|---:|"]
        lines += [
            f"| {number} | {len(values)} | {statistics.fmean(values):.3f} | {min(values):.3f} | {max(values):.3f} |"
            for number, values in sweep.seeds.items()
        ]
    lines += ["", f"Test split, {sweep.confidence * 100:g} % interval:", ""]
    lines += ["| metric | " + " | ".join(map(escape, sweep.methods)) + " |", "|---|" + "---:|" * len(sweep.methods)]
    for metric in dict.fromkeys(metric for found in sweep.methods.values() for metric in found):
        cells = [summary.show(found.get(metric)) for found in sweep.methods.values()]
        lines.append("| " + " | ".join([escape(title_of(metric)), *cells]) + " |")
    failed = [row for row in sweep.trials if row.error]
    if failed:
        lines += ["", "| trial that raised | error |", "|---:|---|"]
        lines += [f"| {row.number} | {escape(row.error or '')} |" for row in failed]
    return "\n".join([*lines, "", RESEARCH_USE, ""])


def render_terminal(sweep: SweepSummary) -> str:
    """The best trials, what raised, and the test split, 100 columns wide and without colour codes."""
    target = io.StringIO()
    console = Console(
        file=target, width=WIDTH, force_terminal=False, color_system=None, markup=False, emoji=False, highlight=False
    )
    console.print(sweep.title)
    console.print(_counted(sweep))
    best = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("trial", title_of(sweep.metric), sweep.unit):
        best.add_column(heading, justify="right")
    best.add_column("what it changes", overflow="fold")
    for row in sweep.best[:LISTED]:
        best.add_row(str(row.number), show_number(row.value), f"{row.worker_seconds:.0f}", show_changes(row.changes))
    if sweep.default_value is not None:
        best.add_row("default", show_number(sweep.default_value), "", "")
    console.print(best)
    for name, share in sweep.importance.items():
        console.print(f"importance {share:.2f}  {name} ({_side(sweep, name)})")
    for row in sweep.trials:
        if row.error:
            console.print(f"trial {row.number} raised: {row.error}")
    tested = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    tested.add_column(f"test split [{sweep.confidence * 100:g} % interval]")
    for method in sweep.methods:
        tested.add_column(method, justify="right")
    for metric in dict.fromkeys(metric for found in sweep.methods.values() for metric in found):
        tested.add_row(title_of(metric), *(summary.show(found.get(metric)) for found in sweep.methods.values()))
    console.print(tested)
    console.print(RESEARCH_USE)
    return "\n".join(line.rstrip() for line in target.getvalue().splitlines()) + "\n"


def show_number(value: float | None) -> str:
    """`0.433`, or `n/a`."""
    return NOTHING if value is None else f"{value:.4g}"


def show_changes(changes: dict[str, Any]) -> str:
    """`pair.sampler kind hard, top 3; train.student.lora_rank 8`."""
    return "; ".join(f"{path} {_show(value)}" for path, value in changes.items())


def draw_importance(sweep: SweepSummary) -> str:
    """A bar for each parameter, data-side ones apart in colour; empty where nothing was weighed."""
    shares = sweep.importance
    if not shares:
        return ""

    def draw(axes: Axes) -> None:
        labelled: set[str] = set()
        for place, (name, share) in enumerate(shares.items()):
            side = _side(sweep, name)
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


def _counted(sweep: SweepSummary) -> str:
    names = {"complete": "ran to their end", "pruned": "given up", "fail": "raised", "running": "cut off"}
    states = ", ".join(f"{count} {names.get(state, state)}" for state, count in sweep.states.items())
    cost = sum(row.worker_seconds for row in sweep.trials)
    saved = sweep.saved_seconds
    spared = "" if saved is None else f"; giving up spared some {show_seconds(max(saved, 0.0))} of them"
    return f"{len(sweep.trials)} trials: {states}. They took {show_seconds(cost)} of {sweep.unit}{spared}."


def _side(sweep: SweepSummary, name: str) -> str:
    return "data" if name in sweep.data_side else "training"


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_show(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_show, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
        return f"{_show(min(known))} to {_show(max(known))}"
    return ", ".join(dict.fromkeys(sorted(map(str, known))))
