"""Settings of the sources."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Literal

from pydantic import Field

from mint_ray.config.loader import settings
from mint_ray.records import Record, Split

FIELDS = tuple(field.name for field in dataclasses.fields(Record))
"""What a column can be mapped to, beside single coded fields and the label's name."""

CODED = "fields."
"""Prefix of a coded field in a column mapping: `fields.age`."""

LABEL_NAME = "label_name"
"""A column that is not a field of Record: the preferred name of the label."""

IMAGE = "image"
"""Another: the images themselves, in a Parquet file."""


def _check_pattern(pattern: str | None) -> None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"group: {pattern!r} is no regular expression: {error}") from error


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
    columns: dict[str, str | None] = dataclasses.field(default_factory=dict)
    """Column of each field of a record, where their names differ: `{record_id: case, fields.age: age, label_name:
    diagnosis}`, or null for a field that is not to be read, such as a `split` of the table's; `phenotypes` is a list of
    HPO ids or one text with `;` between them, `!` or `-` ahead of an absent one. `image_uri` is a path or URI; `image`
    a column of a Parquet file that holds the images themselves, as bytes or as the struct {bytes, path} of
    `datasets`."""
    images: str | None = None
    """Where the images lie whose paths `image_uri` has: a folder or prefix that each is below, or a URI with `{}` in
    its place, such as `images/{}.jpg`; null: beside the table, unless it is a whole URI. What lies there is known by
    its name: an image that is replaced under the same name is not noticed."""
    group: str | None = None
    """Regular expression that finds a record's group in what `group_id` has, as its first bracket or all that matches,
    such as `^.{12}` for the patient in names of TCGA; null: all of it."""

    def __post_init__(self) -> None:
        _check_pattern(self.group)
        known = (*FIELDS, LABEL_NAME, IMAGE)
        for key in self.columns:
            if key not in known and not (key.startswith(CODED) and key != CODED):
                raise ValueError(f"columns: {key!r} is no field of a record; known: {', '.join(known)}, {CODED}*")
        if IMAGE in self.columns:
            if not self.uri.endswith(".parquet"):
                raise ValueError(f"columns: {IMAGE}: only a .parquet file holds images, got {self.uri!r}")
            if "image_uri" in self.columns or self.images is not None:
                raise ValueError(f"columns: {IMAGE}: the images lie in the table, yet image_uri or images is given")


@settings
class ImageFolder(Terms):
    """Images in folders named by their labels: `label/name.jpg`, or deeper below the label."""

    kind: Literal["image_folder"] = "image_folder"
    uri: str
    """The folder of the folders. It is listed whole; for millions of images write a table of their URIs."""
    group: str | None = None
    """Regular expression that finds an image's group in its file name, as for a table; null: each image is its own."""

    def __post_init__(self) -> None:
        _check_pattern(self.group)


@settings
class PanNuke(Terms):
    """The folds of PanNuke (arXiv 2003.10778): patches of 256 x 256 pixels of 19 tissues, with masks of the nuclei."""

    kind: Literal["pannuke"] = "pannuke"
    uri: str
    """A folder of this machine in which, at any depth, `fold1/images.npy`, `fold1/types.npy` and `fold1/masks.npy` lie,
    as the published archives have them; the arrays are mapped, never read whole."""
    folds: dict[str, Split] = dataclasses.field(
        default_factory=lambda: {"fold1": "train", "fold2": "validation", "fold3": "test"}
    )
    """Which split each fold is; a fold that is not named is left out."""
    nuclei: bool = True
    """Describe each patch's nuclei in coded fields, from the masks: number, size, shape, spacing, number of each kind;
    without it no masks are looked for."""

    def __post_init__(self) -> None:
        if "train" not in self.folds.values():
            raise ValueError(f"folds must name one to train on, got {self.folds}")


@settings
class Tiles(Terms):
    """Pictures of tissue, cut: into tiles or into crops round single nuclei, with what their nuclei measure."""

    kind: Literal["tiles"] = "tiles"
    pictures: Annotated[Table | ImageFolder, Field(discriminator="kind")]
    """The pictures: records with an image. Tiles have their label, group, split and fields."""
    masks: str | None = None
    """Where a picture's mask lies, `{}` for the picture's id, such as `masks/{}.png`: nuclei by number, or only where
    they are; a PNG, TIFF or `.npy`."""
    contours: str | None = None
    """The same for contours as Aperio ImageScope saves them, such as `xml/{}.xml.gz`; where a picture has both, these
    are taken, for a mask does not part nuclei that touch. With neither nothing is measured."""
    cut: Literal["grid", "nuclei"] = "grid"
    """`grid`: side by side from the upper left, what is left at the other edges is not used; `nuclei`: round the centre
    of a nucleus."""
    size: int = 250
    """Height and width of a tile, in pixels."""
    most: int | None = None
    """Most tiles of one picture, drawn at random; null: all."""
    seed: int = 0
    """Seed of that."""
    max_bytes: int = 64_000_000
    """Largest file."""
    max_pixels: int = 64_000_000
    """Largest height times width of a picture."""

    def __post_init__(self) -> None:
        for name in ("size", "max_bytes", "max_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.most is not None and self.most < 1:
            raise ValueError(f"most must be positive or null, got {self.most}")
        for name in ("masks", "contours"):
            if (getattr(self, name) or "{}").count("{}") != 1:
                raise ValueError(f"{name}: expected one {{}} for the picture's id, got {getattr(self, name)!r}")
        if self.cut == "nuclei" and self.masks is None and self.contours is None:
            raise ValueError("cut is nuclei, so masks or contours must say where they are")


AnySource = Annotated[Phenopackets | Hpo | Table | ImageFolder | PanNuke | Tiles, Field(discriminator="kind")]
