"""Settings of a hyperparameter sweep: search space, search algorithm, pruner and the metric to improve."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mint_ray.config.loader import settings
from mint_ray.config.parallel import ParallelResources
from mint_ray.config.pipeline import PipelineConfig


@settings
class Float:
    """A floating-point range."""

    kind: Literal["float"] = "float"
    low: float
    """Lower bound, inclusive."""
    high: float
    """Upper bound, inclusive."""
    log: bool = False
    """Sample uniformly on a logarithmic scale."""
    num_points: int | None = None
    """Number of values that a grid search tries, both bounds included; other searches ignore it."""

    renamed_keys: ClassVar[dict[str, str]] = {"points": "num_points"}

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high, self.log)
        if self.num_points is not None and self.num_points < 2:
            raise ValueError(f"num_points must be at least 2, got {self.num_points}")


@settings
class Int:
    """An integer range."""

    kind: Literal["int"] = "int"
    low: int
    """Lower bound, inclusive."""
    high: int
    """Upper bound, inclusive."""
    log: bool = False
    """Sample uniformly on a logarithmic scale."""
    step: int = 1
    """Distance between neighbouring values, counted from `low`."""

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high, self.log)
        if self.step < 1:
            raise ValueError(f"step must be positive, got {self.step}")
        if self.log and self.step != 1:
            raise ValueError(f"step must be 1 if log is true, got {self.step}")


@settings
class Choice:
    """A categorical parameter: plain values, lists, or sections that may contain ranges and choices themselves.

    Ranges inside a section are conditional parameters: they are sampled only in trials that picked this section. This
    is how a sampler brings its own parameters.
    """

    kind: Literal["choice"] = "choice"
    choices: tuple[Any, ...]
    """Values to choose from."""

    renamed_keys: ClassVar[dict[str, str]] = {"of": "choices"}

    def __post_init__(self) -> None:
        if not self.choices:
            raise ValueError("choices must contain at least one value, got none")


AnyRange = Annotated[Float | Int | Choice, Field(discriminator="kind")]

RANGES: dict[str, type[Float | Int | Choice]] = {"float": Float, "int": Int, "choice": Choice}


@settings
class Tpe:
    """Tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011)."""

    kind: Literal["tpe"] = "tpe"
    seed: int = 0
    """Seed of the search."""
    n_startup_trials: int = 10
    """Number of random trials before the estimator is used."""

    renamed_keys: ClassVar[dict[str, str]] = {"startup_trials": "n_startup_trials"}


@settings
class MultiObjective:
    """Tree-structured Parzen estimator for two objectives: the metric, and the worker-seconds of a trial."""

    kind: Literal["multi_objective"] = "multi_objective"
    seed: int = 0
    """Seed of the search."""
    n_startup_trials: int = 10
    """Number of random trials before the estimator is used."""

    renamed_keys: ClassVar[dict[str, str]] = {"startup_trials": "n_startup_trials"}


@settings
class Random:
    """Random search."""

    kind: Literal["random"] = "random"
    seed: int = 0
    """Seed of the search."""


@settings
class Grid:
    """Grid search: every combination once, in the order of the spec; a `float` range then needs `num_points`."""

    kind: Literal["grid"] = "grid"


AnySearch = Annotated[Tpe | MultiObjective | Random | Grid, Field(discriminator="kind")]


@settings
class Asha:
    """Asynchronous successive halving (Li et al., MLSys 2020): each rung promotes the best 1 / `reduction_factor`.

    Rungs are at `grace_period` times powers of `reduction_factor` steps; a trial is compared at its first validation
    at or after a rung.
    """

    kind: Literal["asha"] = "asha"
    metric: str = "nll_loss"
    """Validation metric of training that is compared at a rung; lower is better if its name ends in `loss`.

    The default is the loss on the chosen completions alone. `loss` includes the odds-ratio term with its `beta`, and
    the reward accuracy is measured on the trial's own pairs: neither can be compared between trials that differ in
    `beta` or in the pairs.
    """
    grace_period: int = 1
    """Minimum number of optimizer steps before a trial can be pruned."""
    reduction_factor: int = 3
    """Factor by which each rung reduces the number of trials."""

    renamed_keys: ClassVar[dict[str, str]] = {"first_step": "grace_period"}

    def __post_init__(self) -> None:
        if self.grace_period < 1:
            raise ValueError(f"grace_period must be positive, got {self.grace_period}")
        if self.reduction_factor < 2:
            raise ValueError(f"reduction_factor must be at least 2, got {self.reduction_factor}")

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """Direction of `metric`."""
        return "minimize" if self.metric.endswith("loss") else "maximize"


@settings
class NoPruner:
    """No pruning: every trial trains to the end."""

    kind: Literal["none"] = "none"


@settings
class Sweep:
    """Settings of the search for the best spec."""

    space: dict[str, AnyRange]
    """Search space: dotted path of the spec to the values that it may take."""
    metric: str = "top_k_accuracy"
    """Metric of the aligned student on the validation split; the search never reads the test split."""
    direction: Literal["maximize", "minimize"] = "maximize"
    """Direction of `metric`."""
    n_trials: int = 20
    """Total number of trials, over all runs of the sweep."""
    search: AnySearch = Tpe()
    pruner: Annotated[Asha | NoPruner, Field(discriminator="kind")] = NoPruner()
    finalists: int = 2
    """Number of best trials that are trained again with other seeds."""
    num_seeds: int = 2
    """Number of additional training seeds per finalist; 0 takes the best trial as it is."""
    storage: str | None = None
    """Optuna storage of the study: `sqlite:///study.db`, `postgresql://user:password@host/database`, or the path of a
    journal file; null: a journal file below the root. Written to no artifact and no log."""
    resources: ParallelResources = ParallelResources()

    renamed_keys: ClassVar[dict[str, str]] = {
        "best": "finalists",
        "trials": "n_trials",
        "seeds": "num_seeds",
        "store": "storage",
    }

    def __post_init__(self) -> None:
        if not self.space:
            raise ValueError("space must contain at least one path, got none")
        if self.n_trials < 1:
            raise ValueError(f"n_trials must be positive, got {self.n_trials}")
        if self.finalists < 1 or self.num_seeds < 0:
            raise ValueError(
                f"finalists must be positive and num_seeds not negative, got {self.finalists} and {self.num_seeds}"
            )
        if self.search.kind == "multi_objective" and self.pruner.kind != "none":
            raise ValueError("search multi_objective has no single metric to prune by; set pruner: {kind: none}")


@settings
class SweepConfig(PipelineConfig):
    """A pipeline and the search over its settings; the spec's own values are the default to compare with."""

    sweep: Sweep


def _check_bounds(low: float, high: float, log: bool) -> None:
    if low >= high:
        raise ValueError(f"low must be below high, got {low} and {high}")
    if log and low <= 0:
        raise ValueError(f"low must be positive if log is true, got {low}")
