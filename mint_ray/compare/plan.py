"""Resolve the methods of a comparison to pipeline configs, and check that they share what they must share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from mint_ray.config.comparison import ComparisonConfig
from mint_ray.config.loader import UserError, iter_leaves, replace, without_resources
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.records import Method
from mint_ray.reports.comparison import Role

STUDENT, ALLOW_DIFFERENCES = "student", "allow_differences"
"""Keys of a method that are no settings of the pipeline."""
RENAMED_KEYS = {"unequal": ALLOW_DIFFERENCES}

COMPARED = ("train.trainer.objective", "pair.sampler", "pair.control", "evaluate.retrieval")
"""Settings in which methods may differ."""
SHARED = ("pair.sampler.top", "pair.sampler.pairs_per_record")
"""Settings inside these that must be equal: the length of the lists, and the amount of training data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodPlan:
    """A method of the comparison, resolved to one pipeline config per seed."""

    name: str
    configs: list[PipelineConfig]
    student: Literal["base", "aligned"]
    """Student whose answers are evaluated."""
    differences: list[str]
    """Settings in which the method differs although all methods should share them, by dotted path."""

    @property
    def methods(self) -> list[Method]:
        """Answers that are evaluated, one per mode; with retrieval, only the answers with passages."""
        evaluate = self.configs[0].evaluate
        return [
            Method(student=self.student, retrieval=evaluate.retrieval is not None, mode=mode)
            for mode in evaluate.generation.modes
        ]

    @property
    def role(self) -> Role:
        """Role of the method in the report."""
        return "control" if self.configs[0].pair.control else "method"


def plan_methods(config: ComparisonConfig) -> list[MethodPlan]:
    """Return every method with its configs. Raises UserError for one that is invalid or not on equal terms."""
    return [_plan(config, name, settings) for name, settings in config.methods.items()]


def _plan(config: ComparisonConfig, name: str, settings: Mapping[str, Any]) -> MethodPlan:
    where = f"methods.{name}"
    for old, new in RENAMED_KEYS.items():
        if old in settings:
            raise UserError(f"{where}.{old}: unknown key (got {settings[old]!r}); did you mean {new!r}?")
    overrides = {key: value for key, value in settings.items() if key not in (STUDENT, ALLOW_DIFFERENCES)}
    student, allow_differences = settings.get(STUDENT, "aligned"), settings.get(ALLOW_DIFFERENCES, False)
    if student not in ("base", "aligned"):
        raise UserError(f"{where}.{STUDENT}: expected base or aligned, got {student!r}")
    if not isinstance(allow_differences, bool):
        raise UserError(f"{where}.{ALLOW_DIFFERENCES}: expected true or false, got {allow_differences!r}")
    shared = config.pipeline
    try:
        changed = replace(shared, overrides)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('config: ')}") from error
    differences = _differences(shared, changed)
    if differences and not allow_differences:
        raise UserError(
            f"{where}: {', '.join(differences)}: must be equal for all methods; `allow_differences: true` permits the "
            "difference and shows it in the table"
        )
    # the base student is not trained, so it does not depend on the seed
    seeds = config.seeds if student == "aligned" else config.seeds[:1]
    return MethodPlan(
        name=name, configs=[_with_seed(changed, seed) for seed in seeds], student=student, differences=differences
    )


def _with_seed(config: PipelineConfig, seed: int) -> PipelineConfig:
    changes = {"train.trainer.seed": seed}
    if config.pair.sampler.is_random:
        changes["pair.sampler.seed"] = seed
    return replace(config, changes)


def _differences(shared: PipelineConfig, changed: PipelineConfig) -> list[str]:
    """Return the dotted paths of settings that must be equal but differ, in the order of the config."""
    before, after = dict(iter_leaves(without_resources(shared))), dict(iter_leaves(without_resources(changed)))
    missing = object()
    return [
        path
        for path in dict.fromkeys([*before, *after])
        if before.get(path, missing) != after.get(path, missing)
        and (path in SHARED or not any(path == compared or path.startswith(f"{compared}.") for compared in COMPARED))
    ]
