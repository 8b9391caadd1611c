"""What a sweep may vary, in which order it tries, when it gives a trial up, and what it calls better."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mint_ray.config.loader import dump, from_data, settings
from mint_ray.config.parallel import ParallelResources
from mint_ray.config.pipeline import PipelineConfig


@settings
class Float:
    """Any number between two ends."""

    kind: Literal["float"] = "float"
    low: float
    """Least value."""
    high: float
    """Greatest value."""
    log: bool = False
    """Draw evenly over the logarithm: as often between 0.01 and 0.1 as between 0.1 and 1."""
    points: int | None = None
    """How many values a grid takes, both ends among them; other searches do not look at it."""

    def __post_init__(self) -> None:
        _check_ends(self.low, self.high, self.log)
        if self.points is not None and self.points < 2:
            raise ValueError(f"points must be at least 2, got {self.points}")


@settings
class Int:
    """A whole number between two ends."""

    kind: Literal["int"] = "int"
    low: int
    """Least value."""
    high: int
    """Greatest value."""
    log: bool = False
    """Draw evenly over the logarithm."""
    step: int = 1
    """Distance of neighbouring values, counted from `low`."""

    def __post_init__(self) -> None:
        _check_ends(self.low, self.high, self.log)
        if self.step < 1:
            raise ValueError(f"step must be positive, got {self.step}")
        if self.log and self.step != 1:
            raise ValueError(f"step must be 1 where log is true, got {self.step}")


@settings
class Choice:
    """One of several members: plain values, lists, or sections that may hold ranges and choices of their own.

    What stands inside a section is drawn in the trials that chose it and in no other, so that a sampler brings its own
    parameters.
    """

    kind: Literal["choice"] = "choice"
    of: tuple[Any, ...]
    """The members."""

    def __post_init__(self) -> None:
        if not self.of:
            raise ValueError("of must name at least one member, got none")


AnyRange = Annotated[Float | Int | Choice, Field(discriminator="kind")]

RANGES: dict[str, type[Float | Int | Choice]] = {"float": Float, "int": Int, "choice": Choice}


@settings
class Tpe:
    """Tree-structured Parzen estimator: more of what did well (Bergstra et al., NeurIPS 2011)."""

    kind: Literal["tpe"] = "tpe"
    seed: int = 0
    """Seed of all draws."""
    startup_trials: int = 10
    """Trials drawn evenly before the estimator is asked."""


@settings
class MultiObjective:
    """The same estimator for two numbers at once: the metric, and the worker-seconds of a trial."""

    kind: Literal["multi_objective"] = "multi_objective"
    seed: int = 0
    """Seed of all draws."""
    startup_trials: int = 10
    """Trials drawn evenly before the estimator is asked."""


@settings
class Random:
    """Evenly drawn."""

    kind: Literal["random"] = "random"
    seed: int = 0
    """Seed of all draws."""


@settings
class Grid:
    """Every combination once, in the order of the spec; a `float` then needs `points`."""

    kind: Literal["grid"] = "grid"


AnySearch = Annotated[Tpe | MultiObjective | Random | Grid, Field(discriminator="kind")]


@settings
class Asha:
    """Asynchronous successive halving (Li et al., MLSys 2020): at every rung the best 1 / `reduction_factor` go on.

    Rungs lie at `first_step` times powers of `reduction_factor`; a trial is judged at its first validation there.
    """

    kind: Literal["asha"] = "asha"
    metric: str = "nll_loss"
    """Validation metric of training that is compared at a rung; lower is better if its name ends in `loss`.

    The default is the loss on the preferred answers alone. `loss` holds `beta` times the odds, and reward accuracy is
    measured on the pairs that the trial itself drew: neither compares trials that differ in those.
    """
    first_step: int = 1
    """Optimiser steps before a trial can be given up."""
    reduction_factor: int = 3
    """One in so many goes on."""

    def __post_init__(self) -> None:
        if self.first_step < 1:
            raise ValueError(f"first_step must be positive, got {self.first_step}")
        if self.reduction_factor < 2:
            raise ValueError(f"reduction_factor must be at least 2, got {self.reduction_factor}")

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        return "minimize" if self.metric.endswith("loss") else "maximize"


@settings
class Never:
    """Every trial runs to its end."""

    kind: Literal["none"] = "none"


@settings
class Sweep:
    """A search for the best spec."""

    space: dict[str, AnyRange]
    """Dotted path of the spec to what may stand there."""
    metric: str = "top_10_accuracy"
    """Metric of the aligned student on the validation split; the search never touches the test split."""
    direction: Literal["maximize", "minimize"] = "maximize"
    """Which way is better."""
    trials: int = 20
    """How many specs are tried in all, over all runs of the sweep."""
    search: AnySearch = Tpe()
    pruner: Annotated[Asha | Never, Field(discriminator="kind")] = Never()
    best: int = 2
    """So many of the best trials are run again with other training seeds."""
    seeds: int = 2
    """Training seeds besides the trial's own; 0 takes the best trial as it is."""
    store: str | None = None
    """Where the Optuna study lies: `sqlite:///study.db`, `postgresql://user:password@host/database`, or the path of a
    journal file; null: a journal file below the root. Written into no artifact and no log."""
    resources: ParallelResources = ParallelResources()

    def __post_init__(self) -> None:
        if not self.space:
            raise ValueError("space must name at least one path, got none")
        if self.trials < 1:
            raise ValueError(f"trials must be positive, got {self.trials}")
        if self.best < 1 or self.seeds < 0:
            raise ValueError(f"best must be positive and seeds not negative, got {self.best} and {self.seeds}")
        if self.search.kind == "multi_objective" and self.pruner.kind != "none":
            raise ValueError("search multi_objective has no single order to prune by; set pruner: {kind: none}")


@settings
class SweepConfig(PipelineConfig):
    """A run and what may vary in it; what the spec itself says is the default that the sweep is measured against."""

    sweep: Sweep

    @property
    def pipeline(self) -> PipelineConfig:
        """The run without its sweep."""
        return from_data(PipelineConfig, {key: value for key, value in dump(self).items() if key != "sweep"})


def _check_ends(low: float, high: float, log: bool) -> None:
    if low >= high:
        raise ValueError(f"low must be below high, got {low} and {high}")
    if log and low <= 0:
        raise ValueError(f"low must be positive where log is true, got {low}")
