"""Show what a sweep tried, what mattered, and what the best spec is worth."""

from __future__ import annotations

import dataclasses
import io
import statistics
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mint_ray.metrics import Estimate
from mint_ray.reports import summary
from mint_ray.reports.summary import NOTHING, RESEARCH_USE, show_seconds, title_of
from mint_ray.reports.text import WIDTH, escape

LISTED = 10
"""Trials in the table of the best."""


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
            f"| {escape(name)} | {side_of(sweep, name)} | {share:.2f} |" for name, share in sweep.importance.items()
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
        console.print(f"importance {share:.2f}  {name} ({side_of(sweep, name)})")
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
    return "; ".join(f"{path} {show_setting(value)}" for path, value in changes.items())


def side_of(sweep: SweepSummary, name: str) -> str:
    """Whether a parameter is of the pairs or of the training."""
    return "data" if name in sweep.data_side else "training"


def show_setting(value: Any) -> str:
    """A value of a spec as people read it: `kind hard, top 3`."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {show_setting(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(show_setting, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _counted(sweep: SweepSummary) -> str:
    names = {"complete": "ran to their end", "pruned": "given up", "fail": "raised", "running": "cut off"}
    states = ", ".join(f"{count} {names.get(state, state)}" for state, count in sweep.states.items())
    cost = sum(row.worker_seconds for row in sweep.trials)
    saved = sweep.saved_seconds
    spared = "" if saved is None else f"; giving up spared some {show_seconds(max(saved, 0.0))} of them"
    return f"{len(sweep.trials)} trials: {states}. They took {show_seconds(cost)} of {sweep.unit}{spared}."
