"""Settings of the tasks."""

from __future__ import annotations

from typing import Literal

from mint_ray.loading import settings


@settings
class Labels:
    """Which labels of a source are asked for; records of the others are left out."""

    ids: tuple[str, ...] = ()
    """Exactly these labels, such as `OMIM:163950`; empty: chosen by the counts below."""
    most: int | None = None
    """The most frequent so many; null: all."""
    min_records: int = 1
    """Fewest records of a label."""
    min_groups: int = 1
    """Fewest groups (persons or publications) of a label; 3 lets each split have one."""
    max_records_per_label: int | None = None
    """Records kept of each label, drawn at random; null: all."""

    def __post_init__(self) -> None:
        for name in ("most", "min_records", "min_groups", "max_records_per_label"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")


@settings
class RareDisease:
    """Name the rare diseases that a patient's clinical note points to."""

    kind: Literal["rare_disease"] = "rare_disease"
    labels: Labels = Labels()
    hide_face: bool = True
    """Leave facial findings (HP:0000271 and below) out of the note: they stand in for the photograph."""
    hide_gene: bool = True
    """Leave the gene out of the note: it names the disease almost one to one."""
    max_findings: int = 20
    """Findings told, most specific first."""
    max_absent: int = 10
    """Findings told to be absent, most specific first."""
    synonyms: str | None = None
    """URI of a `.jsonl` or `.csv` file with the columns `label_id` and `synonym`: more names that count as right."""

    def __post_init__(self) -> None:
        if self.max_findings < 1 or self.max_absent < 0:
            raise ValueError(
                f"max_findings must be positive and max_absent not negative, got {self.max_findings} and "
                f"{self.max_absent}"
            )


AnyTask = RareDisease  # a union as soon as there is a second task, told apart by `kind`
