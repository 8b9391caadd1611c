"""A mixture of samplers, one of which draws the pairs of a record."""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import Annotated, Any, Literal

from pydantic import Field

from mint_ray.config.loader import settings
from mint_ray.records import TeacherScores
from mint_ray.samplers.affinity import Confusion, Sibling
from mint_ray.samplers.base import EMPTY_CONTEXT, ChosenRejected, Requirement, Sampler, SamplerContext
from mint_ray.samplers.on_policy import OnPolicy
from mint_ray.samplers.ranking import Hard, Margin, Permuted, TopBottom, Uniform

SHARED_FIELDS = ("top", "bottom", "pairs_per_record", "truth_first", "seed")
"""Fields of the mixture that apply to all its members."""


@settings
class MixtureMember:
    """One sampler of a mixture and its weight."""

    weight: float = 1.0
    """Probability of this sampler, relative to the sum of all weights."""
    sampler: Annotated[
        TopBottom | Hard | Margin | Uniform | Permuted | Confusion | Sibling | OnPolicy, Field(discriminator="kind")
    ]

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"weight must be positive, got {self.weight}")


@settings
class Mixture(Sampler):
    """Several samplers; each record's pairs are drawn by one of them, which is itself drawn by weight.

    List lengths, pairs per record, `truth_first` and seed are those of the mixture.
    """

    kind: Literal["mixture"] = "mixture"
    members: tuple[MixtureMember, ...]
    """The samplers and their weights."""

    def __post_init__(self) -> None:
        Sampler.__post_init__(self)
        if not self.members:
            raise ValueError("members must name at least one sampler, got none")
        defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(Sampler)}
        for member in self.members:
            for name in SHARED_FIELDS:
                value, own = getattr(member.sampler, name), getattr(self, name)
                if value not in (defaults[name], own):
                    raise ValueError(
                        f"{name} is set by the mixture, to {own}; its member {member.sampler.kind} has {value}"
                    )
        _ = self.samplers  # validates the members with the mixture's list lengths

    @functools.cached_property
    def samplers(self) -> tuple[Sampler, ...]:
        """The members with the shared fields of the mixture."""
        shared = {name: getattr(self, name) for name in SHARED_FIELDS}
        return tuple(dataclasses.replace(member.sampler, **shared) for member in self.members)

    @property
    def min_labels(self) -> int:
        """Minimum number of labels of the task: the maximum over the members."""
        return max(sampler.min_labels for sampler in self.samplers)

    @property
    def requires(self) -> frozenset[Requirement]:
        """Fields of the context that any member requires."""
        return frozenset().union(*(sampler.requires for sampler in self.samplers))

    @property
    def required_students(self) -> frozenset[str | None]:
        """Students that any member requires."""
        return frozenset().union(*(sampler.required_students for sampler in self.samplers))

    @property
    def is_random(self) -> bool:
        """True: the member is drawn."""
        return True

    def for_record(self, record_id: str) -> Sampler:
        """Return the member that draws this record's pairs."""
        # a random stream of its own: the draw of the member must not be correlated with the member's draws
        rng = random.Random(f"{self.seed}:mixture:{record_id}")
        [sampler] = rng.choices(self.samplers, [member.weight for member in self.members])
        return sampler

    def draw(
        self, scores: TeacherScores, truth: str | None, context: SamplerContext = EMPTY_CONTEXT
    ) -> list[ChosenRejected]:
        """Return the pairs that the record's member draws."""
        return self.for_record(scores.record_id).draw(scores, truth, context)
