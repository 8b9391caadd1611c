"""Settings of the sources."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

from mint_ray.loading import settings
from mint_ray.records import Record

FIELDS = tuple(field.name for field in dataclasses.fields(Record))
"""What a column can be mapped to, beside single coded fields and the label's name."""

CODED = "fields."
"""Prefix of a coded field in a column mapping: `fields.age`."""

LABEL_NAME = "label_name"
"""The one column that is not a field of Record: the preferred name of the label."""


@settings
class Terms:
    """What every source has: the terms its records come under, as the user states them; nothing is guessed."""

    # described in the annotation, for a docstring under a field is not inherited by the members' schemas
    license: Annotated[
        str | None,
        Field(
            description="License of the records, for the card of the pairs: an identifier of the Hugging Face Hub such "
            "as `cc-by-4.0`, or a name of your own; null: unknown."
        ),
    ] = None
    citation: Annotated[
        str | None, Field(description="How the records ask to be cited, for the card of the pairs; null: unknown.")
    ] = None


@settings
class Phenopackets(Terms):
    """Cases as GA4GH Phenopackets, version 2."""

    kind: Literal["phenopackets"] = "phenopackets"
    uri: str
    """A `.json`, `.jsonl`, `.jsonl.gz` or `.zip` file, or a folder of them; a line of JSONL is a phenopacket or an
    object with the keys `path` and `phenopacket`."""


@settings
class Hpo(Terms):
    """Made-up patients drawn from the disease annotations of the Human Phenotype Ontology."""

    kind: Literal["hpo"] = "hpo"
    diseases: int = 20
    """Diseases drawn from those with enough annotated findings, inside and outside the face."""
    patients_per_disease: int = 20
    """Patients drawn for each disease."""
    left_out: float = 0.3
    """Chance that a finding the patient has is not reported."""
    noise: float = 0.2
    """Unrelated findings added, per reported finding."""
    imprecise: float = 0.2
    """Chance that a finding is reported as its less precise parent term."""
    absent: int = 4
    """Findings reported as looked for and absent, at most."""
    seed: int = 0
    """Seed of the choice of diseases and of every patient."""

    def __post_init__(self) -> None:
        if self.diseases < 1 or self.patients_per_disease < 1:
            raise ValueError(
                f"diseases and patients_per_disease must be positive, got {self.diseases} and "
                f"{self.patients_per_disease}"
            )
        for name in ("left_out", "noise", "imprecise"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.absent < 0:
            raise ValueError(f"absent must not be negative, got {self.absent}")


@settings
class Table(Terms):
    """Records as the rows of a table."""

    kind: Literal["table"] = "table"
    uri: str
    """A `.parquet`, `.jsonl`, `.jsonl.gz` or `.csv` file."""
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Column of each field of a record, where their names differ: `{record_id: case, fields.age: age, label_name:
    diagnosis}`; `phenotypes` is a list of HPO ids or one text with `;` between them, `!` or `-` ahead of an absent
    one."""

    def __post_init__(self) -> None:
        known = (*FIELDS, LABEL_NAME)
        for key in self.columns:
            if key not in known and not (key.startswith(CODED) and key != CODED):
                raise ValueError(f"columns: {key!r} is no field of a record; known: {', '.join(known)}, {CODED}*")


AnySource = Annotated[Phenopackets | Hpo | Table, Field(discriminator="kind")]
