"""Samplers of the chosen and rejected labels of a record, by the teacher's scores; the settings are the sampler."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mint_ray.samplers.affinity import Confusion, Sibling, count_confusions, to_affinity_matrix
from mint_ray.samplers.base import (
    EMPTY_CONTEXT,
    AffinityMatrix,
    ChosenRejected,
    Requirement,
    Sampler,
    SamplerContext,
)
from mint_ray.samplers.difficulty import difficulty
from mint_ray.samplers.mixture import Mixture, MixtureMember
from mint_ray.samplers.on_policy import OnPolicy
from mint_ray.samplers.ranking import Hard, Margin, Permuted, TopBottom, Uniform
from mint_ray.samplers.truth import Truth

AnySampler = Annotated[
    TopBottom | Hard | Margin | Uniform | Permuted | Confusion | Sibling | OnPolicy | Mixture | Truth,
    Field(discriminator="kind"),
]
"""Settings of `pair.sampler`, selected by `kind`."""

__all__ = [
    "EMPTY_CONTEXT",
    "AffinityMatrix",
    "AnySampler",
    "ChosenRejected",
    "Confusion",
    "Hard",
    "Margin",
    "Mixture",
    "MixtureMember",
    "OnPolicy",
    "Permuted",
    "Requirement",
    "Sampler",
    "SamplerContext",
    "Sibling",
    "TopBottom",
    "Truth",
    "Uniform",
    "count_confusions",
    "difficulty",
    "to_affinity_matrix",
]
