"""Everything that the report of a sweep shows, its tables, and its forms as plain text and Markdown."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from mint_ray.metrics import Estimate
from mint_ray.reports import tables
from mint_ray.reports.formatting import (
    RESEARCH_USE,
    find_k,
    format_changes,
    format_number,
    metric_title,
)
from mint_ray.reports.tables import Table, escape, make_table
from mint_ray.reports.text import results_table

MAX_LISTED = 10
"""Number of trials in the table of the best."""

STATES = {"complete": "complete", "pruned": "pruned", "fail": "failed", "running": "interrupted"}
"""Optuna's states of a trial, for people."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One trial and its result."""

    number: int
    state: str
    """Optuna's state: `complete`, `pruned`, `fail`, or `running` if it was interrupted."""
    value: float | None
    """Metric on the validation split; None unless the trial is complete."""
    parameters: dict[str, Any]
    """Sampled parameters."""
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Changes to the spec, by dotted path."""
    curve: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    """Steps and values of the validation metric of training."""
    worker_seconds: float = 0.0
    """Wall clock of the trial times its training workers, over all attempts."""
    wall_seconds: float = 0.0
    """Time from start to end, including interruptions of the sweep."""
    error: str | None = None
    artifacts: dict[str, str] = dataclasses.field(default_factory=dict)
    """Stage to the name of its artifact."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepSummary:
    """Everything that the report of a sweep shows."""

    title: str
    metric: str
    direction: str
    trials: list[TrialRow]
    importance: dict[str, float]
    """Parameter to its importance, largest first."""
    data_parameters: list[str]
    """Parameters of the training data; the others are parameters of the training."""
    curve_metric: str
    """Metric of `TrialRow.curve`."""
    default_value: float | None
    """Metric of the spec without changes on the validation split."""
    seeds: dict[int, list[float]]
    """Finalist to its values with each training seed, its own first."""
    winner: int
    """Number of the best trial."""
    tested: dict[str, dict[str, Estimate]]
    """Estimates of the aligned student on the test split, of `default` and `winner`."""
    confidence: float = 0.95
    """Level of the intervals."""
    workers: int = 1
    """Training workers of a trial."""
    uses_gpus: bool = False
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Resolved config of the sweep."""
    study: str = ""
    """Name of the Optuna study."""

    @property
    def best(self) -> list[TrialRow]:
        """Complete trials, best first."""
        sign = -1 if self.direction == "maximize" else 1
        done = [trial for trial in self.trials if trial.value is not None]
        return sorted(done, key=lambda trial: (sign * (trial.value or 0.0), trial.number))

    @property
    def unit(self) -> str:
        """Unit of the cost of a trial."""
        return "GPU-seconds" if self.uses_gpus else "worker-seconds"

    @property
    def states(self) -> dict[str, int]:
        """Number of trials by state."""
        states = [trial.state for trial in self.trials]
        return {state: states.count(state) for state in dict.fromkeys(states)}

    @property
    def saved_seconds(self) -> float | None:
        """Worker-seconds saved by pruning, if pruned trials had cost as much as complete ones on average."""
        complete = [trial.worker_seconds for trial in self.trials if trial.state == "complete"]
        pruned = [trial.worker_seconds for trial in self.trials if trial.state == "pruned"]
        if not complete or not pruned:
            return None
        return statistics.fmean(complete) * len(pruned) - sum(pruned)

    @property
    def metric_title(self) -> str:
        """Title of the metric."""
        return metric_title(self.metric, find_k(self.tested.values()))

    def group_of(self, parameter: str) -> str:
        """Return `data` or `training`, the side of the pipeline that a parameter belongs to."""
        return "data" if parameter in self.data_parameters else "training"


def pareto_front(trials: list[TrialRow], direction: str) -> list[TrialRow]:
    """Return the trials that no other trial beats in both value and cost, cheapest first."""
    sign = -1 if direction == "maximize" else 1
    front: list[TrialRow] = []
    for trial in sorted(trials, key=lambda trial: (trial.worker_seconds, sign * (trial.value or 0.0), trial.number)):
        if not front or sign * (trial.value or 0.0) < sign * (front[-1].value or 0.0):
            front.append(trial)
    return front


def tested_table(sweep: SweepSummary) -> Table | None:
    """Return the table of default and winner on the test split."""
    return results_table(sweep.tested, sweep.confidence, title="Aligned student on the test split")


def best_table(sweep: SweepSummary) -> Table:
    """Return the table of the best trials and of the default."""
    rows = [
        [
            f"{trial.number} (winner)" if trial.number == sweep.winner else str(trial.number),
            format_number(trial.value),
            f"{trial.worker_seconds:.0f}",
            format_changes(trial.changes),
        ]
        for trial in sweep.best[:MAX_LISTED]
    ]
    if sweep.default_value is not None:
        rows.append(["default", format_number(sweep.default_value), "", ""])
    return make_table(
        ["trial", sweep.metric_title, sweep.unit, "changes"],
        rows,
        text_columns=(0, 3),
        title="Best trials on the validation split",
    )


def importance_table(sweep: SweepSummary) -> Table | None:
    """Return the table of parameters by importance; None if there were too few trials."""
    if not sweep.importance:
        return None
    return make_table(
        ["parameter", "part", "importance"],
        [[name, sweep.group_of(name), f"{share:.2f}"] for name, share in sweep.importance.items()],
        text_columns=(0, 1),
        title="Importance of the parameters",
        note="Importance for reaching the best trials (conditional PED-ANOVA); conditional parameters are weighed "
        "among the trials that have them. With few trials it is a rough estimate.",
    )


def seed_table(sweep: SweepSummary) -> Table | None:
    """Return the table of the finalists over training seeds; None if there were no additional seeds."""
    if not any(len(values) > 1 for values in sweep.seeds.values()):
        return None
    return make_table(
        ["trial", "seeds", "mean", "min", "max"],
        [
            [
                str(number),
                str(len(values)),
                f"{statistics.fmean(values):.3f}",
                f"{min(values):.3f}",
                f"{max(values):.3f}",
            ]
            for number, values in sweep.seeds.items()
        ],
        title="Finalists over training seeds",
        note="The winner has the best mean over training seeds, not the best single trial.",
    )


def trial_table(sweep: SweepSummary) -> Table:
    """Return the table of all trials with their costs and errors."""
    return make_table(
        ["trial", "state", sweep.unit, "last step", "error"],
        [
            [
                str(trial.number),
                STATES.get(trial.state, trial.state),
                f"{trial.worker_seconds:.0f}",
                str(trial.curve[-1][0]) if trial.curve else "",
                trial.error or "",
            ]
            for trial in sweep.trials
        ],
        text_columns=(0, 1, 4),
        title="Cost of the trials",
        note=f"Wall clock of a trial times its {sweep.workers} training worker(s), without artifacts of other trials.",
    )


def trials_sentence(sweep: SweepSummary) -> str:
    """Return the numbers of trials and their cost in one sentence."""
    states = ", ".join(f"{count} {STATES.get(state, state)}" for state, count in sweep.states.items())
    cost = sum(trial.worker_seconds for trial in sweep.trials)
    saved = sweep.saved_seconds
    pruning = "" if saved is None else f"; pruning saved about {max(saved, 0.0):,.0f}"
    return f"{len(sweep.trials)} trials: {states}. Total cost {cost:,.0f} {sweep.unit}{pruning}."


def render_terminal(sweep: SweepSummary) -> str:
    """Render the best trials, failed trials and the test split as plain text."""
    tested = tested_table(sweep)
    return tables.render_text(
        [
            sweep.title,
            trials_sentence(sweep),
            best_table(sweep),
            *(f"importance {share:.2f}  {name} ({sweep.group_of(name)})" for name, share in sweep.importance.items()),
            *(f"trial {trial.number} failed: {trial.error}" for trial in sweep.trials if trial.error),
            *([tested] if tested else []),
            RESEARCH_USE,
        ]
    )


def render_markdown(sweep: SweepSummary) -> str:
    """Render every table of the page as Markdown."""
    blocks = [
        f"# {escape(sweep.title)}",
        escape(trials_sentence(sweep)),
        tested_table(sweep),
        best_table(sweep),
        importance_table(sweep),
        seed_table(sweep),
        trial_table(sweep),
        RESEARCH_USE,
    ]
    return tables.render_markdown(block for block in blocks if block is not None)
