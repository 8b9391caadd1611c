"""Choose which labels a teacher's scores make preferred and which rejected; a sampler's config is the sampler."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mint_ray.samplers.affinity import Confusion, Sibling, count_confusions, to_affinity
from mint_ray.samplers.lists import (
    NOTHING,
    Affinity,
    Ask,
    Hard,
    Knowledge,
    Margin,
    Permuted,
    Sampler,
    Split,
    TopBottom,
    Truth,
    Uniform,
    difficulty,
)
from mint_ray.samplers.mixture import Mixture, Share
from mint_ray.samplers.on_policy import OnPolicy

AnySampler = Annotated[
    TopBottom | Hard | Margin | Uniform | Permuted | Confusion | Sibling | OnPolicy | Mixture | Truth,
    Field(discriminator="kind"),
]

__all__ = [
    "NOTHING",
    "Affinity",
    "AnySampler",
    "Ask",
    "Confusion",
    "Hard",
    "Knowledge",
    "Margin",
    "Mixture",
    "OnPolicy",
    "Permuted",
    "Sampler",
    "Share",
    "Sibling",
    "Split",
    "TopBottom",
    "Truth",
    "Uniform",
    "count_confusions",
    "difficulty",
    "to_affinity",
]
