"""Settings of the teachers."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, Literal

from pydantic import Field

from mint_ray.loading import settings


@settings
class Table:
    """Scores that someone else made: one row per record and label."""

    kind: Literal["table"] = "table"
    uri: str
    """Parquet, CSV or JSONL with the columns `record_id`, `label_id`, `score` (larger is better)."""


@settings
class Ontology:
    """Ranks labels by the semantic similarity of a patient's coded phenotypes to the annotated disease profiles."""

    kind: Literal["ontology"] = "ontology"
    absent_weight: float = 0.1
    """Weight of findings that were looked for and are absent although the disease would show them."""
    unknown_frequency: float = 0.5
    """Share of patients assumed where an annotation gives no frequency."""

    def __post_init__(self) -> None:
        if self.absent_weight < 0:
            raise ValueError(f"absent_weight must not be negative, got {self.absent_weight}")
        if not 0 < self.unknown_frequency <= 1:
            raise ValueError(f"unknown_frequency must lie in 0 to 1, got {self.unknown_frequency}")


@settings
class Imported:
    """A teacher from a module of yours. Its code runs in every process that fits or asks it."""

    kind: Literal["import"] = "import"
    path: str
    """`package.module:Class`; the module must be installed or on PYTHONPATH, on every machine of the cluster. The class
    has the methods of `mint_ray.teachers.Teacher`."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword arguments of the class; what is secret belongs in the environment, for every manifest repeats them."""

    def __post_init__(self) -> None:
        module, colon, name = self.path.partition(":")
        if not colon or not all(part.isidentifier() for part in [*module.split("."), *name.split(".")]):
            raise ValueError(f"path must be package.module:Class, got {self.path!r}")


@settings
class Member:
    """One teacher of an ensemble."""

    teacher: AnyTeacher
    """Its own settings."""
    weight: float | None = None
    """Its weight beside the others'; null: 1, and with learned weights there is nothing else."""
    temperature: float = 1.0
    """Its scores are divided by this ahead of the softmax: below 1 sharpens, above 1 flattens."""
    labels: tuple[str, ...] = ()
    """Ids of the task's labels that it is asked for; empty: all."""

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise ValueError(f"weight must be positive and finite, got {self.weight}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")


@settings
class Ensemble:
    """Several teachers as one: the weighted mean of their softmax-normalised scores."""

    kind: Literal["ensemble"] = "ensemble"
    members: tuple[Member, ...]
    """At least two."""
    weights: Literal["given", "learned"] = "given"
    """`learned`: those under which the true labels of the validation split are most likely."""

    def __post_init__(self) -> None:
        if len(self.members) < 2:
            raise ValueError(f"members must be two or more, got {len(self.members)}")
        if self.weights == "learned" and any(member.weight is not None for member in self.members):
            raise ValueError("weights are to be learned, yet a member is given one")


AnyTeacher = Annotated[Table | Ontology | Imported | Ensemble, Field(discriminator="kind")]
