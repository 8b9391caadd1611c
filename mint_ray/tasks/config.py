"""Settings of the tasks."""

from __future__ import annotations

import re
from collections import Counter
from typing import Annotated, Literal

from pydantic import Field

from mint_ray.config.loader import settings


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


@settings
class NamedLabel:
    """A label and what it is called."""

    label_id: str
    """As the records have it."""
    name: str
    """What the student is to call it."""
    synonyms: tuple[str, ...] = ()
    """More names that count as right; a `clip` teacher looks for all of them."""

    def __post_init__(self) -> None:
        for name in (self.name, *self.synonyms):
            if not any(letter.isalnum() for letter in name):
                raise ValueError(f"label {self.label_id!r}: a name needs a letter or a digit, got {name!r}")


@settings
class ImageTask:
    """What every task about an image has."""

    # described in the annotation, for a docstring under a field is not inherited by the members' schemas
    labels: Annotated[Labels, Field(description="Which of the labels in `names` are asked for.")] = Labels()
    names: Annotated[
        tuple[NamedLabel, ...],
        Field(description="Every label of the records, in the order in which the prompt lists them."),
    ]
    shows_image: Annotated[
        bool, Field(description="Show the student the image; if not, it reads the coded fields alone.")
    ] = True
    told: Annotated[
        tuple[str, ...],
        Field(description="Coded fields that the student is told, such as `age`; of the record's text it reads none."),
    ] = ()
    system: Annotated[str, Field(description="The system turn.")] = (
        "You are a specialist who reads medical images. Keep to the answer format."
    )
    question: Annotated[str, Field(description="What is asked, ahead of the candidates.")] = "What does the image show?"
    header: Annotated[str, Field(description="First line of the answer.")] = "MOST_LIKELY:"

    def __post_init__(self) -> None:
        counts = Counter(named.label_id for named in self.names)
        if len(counts) < 2:
            raise ValueError(f"names must be two labels or more, got {len(counts)}")
        if twice := [label_id for label_id, count in counts.items() if count > 1]:
            raise ValueError(f"names: label {twice[0]!r} is there twice")
        if strange := [label_id for label_id in self.labels.ids if label_id not in counts]:
            raise ValueError(f"labels.ids: {strange[0]!r} has no name; names has {', '.join(counts)}")
        if not re.fullmatch(r"[^\W_][\w -]*:", self.header):
            raise ValueError(f"header must be words and a colon behind them, got {self.header!r}")
        if not self.shows_image and not self.told:
            raise ValueError("shows_image is false, so told must name a coded field: the student would learn nothing")


@settings
class ImageLabel(ImageTask):
    """Name what an image shows, out of a few labels that stand in the prompt."""

    kind: Literal["image_label"] = "image_label"


PANNUKE = (
    NamedLabel(label_id="Adrenal_gland", name="Adrenal Glands", synonyms=("Adrenal",)),
    NamedLabel(label_id="Bile-duct", name="Bile Duct", synonyms=("Bile Ducts",)),
    NamedLabel(label_id="Bladder", name="Bladder", synonyms=("Urinary Bladder",)),
    NamedLabel(label_id="Breast", name="Breast"),
    NamedLabel(label_id="Cervix", name="Cervix", synonyms=("Uterine Cervix",)),
    NamedLabel(label_id="Colon", name="Colon"),
    NamedLabel(label_id="Esophagus", name="Esophagus", synonyms=("Oesophagus",)),
    NamedLabel(label_id="HeadNeck", name="Head & Neck"),
    NamedLabel(label_id="Kidney", name="Kidney"),
    NamedLabel(label_id="Liver", name="Liver"),
    NamedLabel(label_id="Lung", name="Lung"),
    NamedLabel(label_id="Ovarian", name="Ovarian", synonyms=("Ovary",)),
    NamedLabel(label_id="Pancreatic", name="Pancreatic", synonyms=("Pancreas",)),
    NamedLabel(label_id="Prostate", name="Prostate"),
    NamedLabel(label_id="Skin", name="Skin"),
    NamedLabel(label_id="Stomach", name="Stomach"),
    NamedLabel(label_id="Testis", name="Testis", synonyms=("Testicle",)),
    NamedLabel(label_id="Thyroid", name="Thyroid", synonyms=("Thyroid Gland",)),
    NamedLabel(label_id="Uterus", name="Uterus"),
)
"""The 19 tissues of PanNuke (arXiv 2003.10778), ids as in its `types.npy`, names and order as in the paper."""


@settings
class TissueType(ImageTask):
    """Name the tissue that a histology image shows: the paper's second application."""

    kind: Literal["tissue_type"] = "tissue_type"
    names: tuple[NamedLabel, ...] = PANNUKE
    """Every label of the records, in the order in which the prompt lists them; by default the tissues of PanNuke."""
    system: str = "You are a pathologist. Keep to the answer format."
    """The system turn."""
    question: str = "Which tissue does this histology image show?"
    """What is asked, ahead of the candidates."""
    header: str = "MOST_LIKELY_TISSUE:"
    """First line of the answer."""


AnyTask = Annotated[RareDisease | ImageLabel | TissueType, Field(discriminator="kind")]
