"""Settings of the tasks."""

from __future__ import annotations

import re
from collections import Counter
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mint_ray.config.loader import settings


@settings
class LabelSelection:
    """Labels of a source that the task uses; records with other labels are dropped."""

    renamed_keys: ClassVar[dict[str, str]] = {"most": "max_labels"}

    ids: tuple[str, ...] = ()
    """Exactly these labels, such as `OMIM:163950`; empty: selected by the counts below."""
    max_labels: int | None = None
    """Maximum number of labels, the most frequent ones; null: all."""
    min_records: int = 1
    """Minimum number of records of a label."""
    min_groups: int = 1
    """Minimum number of groups (patients or publications) of a label; with 3 each split can have one."""
    max_records_per_label: int | None = None
    """Maximum number of records of a label, drawn at random; null: all."""

    def __post_init__(self) -> None:
        for name in ("max_labels", "min_records", "min_groups", "max_records_per_label"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")


@settings
class RareDisease:
    """Rare diseases that a patient's clinical note suggests."""

    kind: Literal["rare_disease"] = "rare_disease"
    labels: LabelSelection = LabelSelection()
    hide_face: bool = True
    """Remove facial findings (HP:0000271 and below) from the note; they are a proxy for the photograph."""
    hide_gene: bool = True
    """Remove the gene from the note; it almost determines the disease."""
    max_findings: int = 20
    """Maximum number of present findings in the note, most specific first."""
    max_absent: int = 10
    """Maximum number of absent findings in the note, most specific first."""
    synonyms: str | None = None
    """URI of a `.jsonl` or `.csv` file with the columns `label_id` and `synonym`: additional names of the labels."""

    def __post_init__(self) -> None:
        if self.max_findings < 1 or self.max_absent < 0:
            raise ValueError(
                f"max_findings must be positive and max_absent not negative, got {self.max_findings} and "
                f"{self.max_absent}"
            )


@settings
class NamedLabel:
    """A label and its names."""

    label_id: str
    """Id of the label in the records."""
    name: str
    """Name that the student must answer."""
    synonyms: tuple[str, ...] = ()
    """Other names that are accepted; a `clip` teacher uses all of them."""

    def __post_init__(self) -> None:
        for name in (self.name, *self.synonyms):
            if not any(letter.isalnum() for letter in name):
                raise ValueError(f"label {self.label_id!r}: a name needs a letter or a digit, got {name!r}")


@settings
class ImageTask:
    """Settings of every task about an image."""

    renamed_keys: ClassVar[dict[str, str]] = {"shows_image": "show_image", "told": "visible_fields"}

    # described in the annotation, for a docstring under a field is not inherited by the members' schemas
    labels: Annotated[LabelSelection, Field(description="Labels of `names` that the task uses.")] = LabelSelection()
    names: Annotated[
        tuple[NamedLabel, ...],
        Field(description="Names of all labels of the records, in the order of the prompt."),
    ]
    show_image: Annotated[
        bool, Field(description="Show the student the image; if false, it reads the coded fields only.")
    ] = True
    visible_fields: Annotated[
        tuple[str, ...],
        Field(description="Coded fields that the student reads, such as `age`; it never reads the record's text."),
    ] = ()
    system: Annotated[str, Field(description="System prompt.")] = (
        "You are a specialist who reads medical images. Keep to the answer format."
    )
    question: Annotated[str, Field(description="Question of the prompt, ahead of the candidates.")] = (
        "What does the image show?"
    )
    header: Annotated[str, Field(description="First line of the answer.")] = "MOST_LIKELY:"

    def __post_init__(self) -> None:
        counts = Counter(named.label_id for named in self.names)
        if len(counts) < 2:
            raise ValueError(f"names must list two or more labels, got {len(counts)}")
        if repeated := [label_id for label_id, count in counts.items() if count > 1]:
            raise ValueError(f"names: label {repeated[0]!r} is listed twice")
        if unknown := [label_id for label_id in self.labels.ids if label_id not in counts]:
            raise ValueError(f"labels.ids: {unknown[0]!r} has no name; names has {', '.join(counts)}")
        if not re.fullmatch(r"[^\W_][\w -]*:", self.header):
            raise ValueError(f"header must be words followed by a colon, got {self.header!r}")
        if not self.show_image and not self.visible_fields:
            raise ValueError("show_image is false, so visible_fields must name a field: the student has no other input")


@settings
class ImageLabel(ImageTask):
    """Content of an image, out of a few candidate labels listed in the prompt."""

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
"""The 19 tissues of PanNuke (arXiv 2003.10778): ids as in its `types.npy`, names and order as in the paper."""


@settings
class TissueType(ImageTask):
    """Tissue of a histology image: the paper's second application."""

    kind: Literal["tissue_type"] = "tissue_type"
    names: tuple[NamedLabel, ...] = PANNUKE
    """Names of all labels of the records, in the order of the prompt; by default the tissues of PanNuke."""
    system: str = "You are a pathologist. Keep to the answer format."
    """System prompt."""
    question: str = "Which tissue does this histology image show?"
    """Question of the prompt, ahead of the candidates."""
    header: str = "MOST_LIKELY_TISSUE:"
    """First line of the answer."""


AnyTask = Annotated[RareDisease | ImageLabel | TissueType, Field(discriminator="kind")]
"""Settings of `task`, selected by `kind`."""
