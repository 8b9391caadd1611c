"""One spec, and for each method the keys in which it differs from the others: what they must share, they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from mint_ray.config.comparison import ComparisonConfig
from mint_ray.config.loader import RESOURCES, UserError, dump, replace
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.reports.comparison import Role
from mint_ray.stages.evaluate import ALIGNED, BASE

STUDENT, UNEQUAL = "student", "unequal"
"""Keys of a method that are no keys of the pipeline's config."""

FREE = ("train.trainer.objective", "pair.sampler", "pair.control", "evaluate.retrieval")
"""Where methods may differ: what is learned from, how, and what else is read to answer."""
SHARED = ("pair.sampler.top", "pair.sampler.pairs_per_record")
"""Where they may not, all the same: the length of the answers, and how much there is to learn from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One way of making a student, resolved: a pipeline config for each seed."""

    name: str
    configs: list[PipelineConfig]
    student: str
    """BASE or ALIGNED: whose answers are judged."""
    unequal: list[str]

    @property
    def reads(self) -> bool:
        """Whether passages are put ahead of the note: only answers given with them then count."""
        return self.configs[0].evaluate.retrieval is not None

    @property
    def role(self) -> Role:
        return "control" if self.configs[0].pair.control else "method"


def shared_config(config: ComparisonConfig) -> PipelineConfig:
    """The run that every method is laid over."""
    return PipelineConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(PipelineConfig)})


def plan_methods(config: ComparisonConfig) -> list[Method]:
    """Every method with its resolved configs. Raises UserError for one that is wrong, or not on equal terms."""
    return [_plan(config, name, said) for name, said in config.methods.items()]


def _plan(config: ComparisonConfig, name: str, said: Mapping[str, Any]) -> Method:
    where = f"methods.{name}"
    overrides = {key: value for key, value in said.items() if key not in (STUDENT, UNEQUAL)}
    student, unequal = said.get(STUDENT, "aligned"), said.get(UNEQUAL, False)
    if student not in ("base", "aligned"):
        raise UserError(f"{where}.{STUDENT}: expected base or aligned, got {student!r}")
    if not isinstance(unequal, bool):
        raise UserError(f"{where}.{UNEQUAL}: expected true or false, got {unequal!r}")
    shared = shared_config(config)
    try:
        changed = replace(shared, overrides)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('config: ')}") from error
    differing = _differing(shared, changed)
    if differing and not unequal:
        raise UserError(
            f"{where}: {', '.join(differing)}: all methods share this; `unequal: true` compares all the same, and says "
            "so in the table"
        )
    # the base student is not trained, so there is nothing for a seed to change
    seeds = config.seeds if student == "aligned" else config.seeds[:1]
    return Method(
        name=name,
        configs=[_seeded(changed, seed) for seed in seeds],
        student=ALIGNED if student == "aligned" else BASE,
        unequal=differing,
    )


def _seeded(config: PipelineConfig, seed: int) -> PipelineConfig:
    changes = {"train.trainer.seed": seed}
    if config.pair.sampler.draws_at_random:
        changes["pair.sampler.seed"] = seed
    return replace(config, changes)


def _differing(shared: PipelineConfig, changed: PipelineConfig) -> list[str]:
    """Dotted paths of what the two should share and do not, in the order of the config."""
    ours, theirs = dict(_leaves(dump(shared))), dict(_leaves(dump(changed)))
    nothing = object()
    return [
        path
        for path in dict.fromkeys([*ours, *theirs])
        if ours.get(path, nothing) != theirs.get(path, nothing)
        and (path in SHARED or not any(path == free or path.startswith(f"{free}.") for free in FREE))
        and RESOURCES not in path.split(".")
    ]


def _leaves(data: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
