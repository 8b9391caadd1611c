"""Settings of the teachers."""

from __future__ import annotations

from typing import Annotated, Literal

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


AnyTeacher = Annotated[Table | Ontology, Field(discriminator="kind")]
