"""Several samplers, of which each record is given one."""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import Annotated, Any, Literal

from pydantic import Field

from mint_ray.config.loader import settings
from mint_ray.records import TeacherScores
from mint_ray.samplers.affinity import Confusion, Sibling
from mint_ray.samplers.lists import (
    NOTHING,
    Ask,
    Hard,
    Knowledge,
    Margin,
    Permuted,
    Sampler,
    Split,
    TopBottom,
    Uniform,
)
from mint_ray.samplers.on_policy import OnPolicy

SHARED = ("top", "bottom", "pairs_per_record", "truth_first", "seed")
"""Fields in which all members are as the mixture says."""


@settings
class Share:
    """One sampler of a mixture."""

    weight: float = 1.0
    """Its records are to all records as this weight to the sum of all weights."""
    sampler: Annotated[
        TopBottom | Hard | Margin | Uniform | Permuted | Confusion | Sibling | OnPolicy, Field(discriminator="kind")
    ]

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"weight must be positive, got {self.weight}")


@settings
class Mixture(Sampler):
    """Each record's pairs are drawn by one of several samplers, itself drawn by weight.

    The sizes of the lists, pairs per record, `truth_first` and the seed are the mixture's own.
    """

    kind: Literal["mixture"] = "mixture"
    members: tuple[Share, ...]
    """The samplers and their weights."""

    def __post_init__(self) -> None:
        Sampler.__post_init__(self)
        if not self.members:
            raise ValueError("members must name at least one sampler, got none")
        default: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(Sampler)}
        for share in self.members:
            for name in SHARED:
                said, own = getattr(share.sampler, name), getattr(self, name)
                if said not in (default[name], own):
                    raise ValueError(f"{name} is the mixture's to say, {own}; its {share.sampler.kind} says {said}")
        _ = self.samplers  # what the mixture's sizes do not allow a member is said here

    @functools.cached_property
    def samplers(self) -> tuple[Sampler, ...]:
        """The members with what the mixture says for all."""
        shared = {name: getattr(self, name) for name in SHARED}
        return tuple(dataclasses.replace(share.sampler, **shared) for share in self.members)

    @property
    def least_labels(self) -> int:
        return max(sampler.least_labels for sampler in self.samplers)

    @property
    def asks(self) -> frozenset[Ask]:
        return frozenset().union(*(sampler.asks for sampler in self.samplers))

    @property
    def students(self) -> frozenset[str | None]:
        return frozenset().union(*(sampler.students for sampler in self.samplers))

    @property
    def draws_at_random(self) -> bool:
        return True

    def for_record(self, record_id: str) -> Sampler:
        # a stream apart from the members': which is drawn must not tell what it draws
        rng = random.Random(f"{self.seed}:mixture:{record_id}")
        [sampler] = rng.choices(self.samplers, [share.weight for share in self.members])
        return sampler

    def draw(self, scores: TeacherScores, truth: str | None, knowledge: Knowledge = NOTHING) -> list[Split]:
        return self.for_record(scores.record_id).draw(scores, truth, knowledge)
