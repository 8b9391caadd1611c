"""Settings of the sources."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mint_ray.config.loader import settings
from mint_ray.records import Record, Split

RECORD_FIELDS = tuple(field.name for field in dataclasses.fields(Record))
"""Targets of a column mapping, besides single coded fields, the label's name and images."""

CODED_FIELD_PREFIX = "fields."
"""Prefix of a coded field in a column mapping: `fields.age`."""

LABEL_NAME = "label_name"
"""Target of a column with the preferred name of the label."""

IMAGE = "image"
"""Target of a Parquet column that contains the images."""


def _check_pattern(pattern: str | None) -> None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"group_pattern: {pattern!r} is not a regular expression: {error}") from error


@settings
class SourceSettings:
    """Settings of every source: license and citation of its records, as the user states them."""

    # described in the annotation, for a docstring under a field is not inherited by the members' schemas
    license: Annotated[
        str | None,
        Field(
            description="License of the records, for the dataset card of the pairs: an identifier of the Hugging Face "
            "Hub such as `cc-by-4.0`, or another name; null: unknown."
        ),
    ] = None
    citation: Annotated[
        str | None, Field(description="Citation of the records, for the dataset card of the pairs; null: unknown.")
    ] = None


@settings
class Phenopackets(SourceSettings):
    """Cases as GA4GH Phenopackets, version 2."""

    kind: Literal["phenopackets"] = "phenopackets"
    uri: str
    """A `.json`, `.jsonl`, `.jsonl.gz` or `.zip` file, or a folder of them; a line of JSONL is a phenopacket or an
    object with the keys `path` and `phenopacket`."""


@settings
class Hpo(SourceSettings):
    """Simulated patients, drawn from the disease annotations of the Human Phenotype Ontology."""

    renamed_keys: ClassVar[dict[str, str]] = {
        "diseases": "num_diseases",
        "left_out": "omission_rate",
        "noise": "noise_rate",
        "imprecise": "generalization_rate",
        "absent": "max_absent",
    }

    kind: Literal["hpo"] = "hpo"
    num_diseases: int = 20
    """Diseases, drawn from those with enough annotated findings inside and outside the face."""
    patients_per_disease: int = 20
    """Patients of each disease."""
    omission_rate: float = 0.3
    """Probability that a finding of the patient is not reported."""
    noise_rate: float = 0.2
    """Expected number of unrelated findings per reported finding."""
    generalization_rate: float = 0.2
    """Probability that a finding is reported as its parent term."""
    max_absent: int = 4
    """Maximum number of findings reported as absent."""
    seed: int = 0
    """Seed of the choice of diseases and of every patient."""

    def __post_init__(self) -> None:
        if self.num_diseases < 1 or self.patients_per_disease < 1:
            raise ValueError(
                f"num_diseases and patients_per_disease must be positive, got {self.num_diseases} and "
                f"{self.patients_per_disease}"
            )
        for name in ("omission_rate", "noise_rate", "generalization_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.max_absent < 0:
            raise ValueError(f"max_absent must not be negative, got {self.max_absent}")


@settings
class Table(SourceSettings):
    """Records as the rows of a table."""

    renamed_keys: ClassVar[dict[str, str]] = {"group": "group_pattern"}

    kind: Literal["table"] = "table"
    uri: str
    """A `.parquet`, `.jsonl`, `.jsonl.gz` or `.csv` file."""
    columns: dict[str, str | None] = dataclasses.field(default_factory=dict)
    """Column of each field of a record whose names differ: `{record_id: case, fields.age: age, label_name: diagnosis}`,
    or null for a field that is not read, such as a `split` of the table. `phenotypes` is a list of HPO ids or a text
    with `;` between them, with `!` or `-` before an absent one. `image_uri` is a path or URI; `image` is a column of a
    Parquet file that contains the images, as bytes or as the struct {bytes, path} of `datasets`."""
    images: str | None = None
    """Location of the images whose relative paths are in `image_uri`: a folder or prefix, or a URI with `{}` in place
    of the path, such as `images/{}.jpg`; null: the folder of the table, unless the path is a full URI. The content of
    images is not part of the fingerprint: an image that is replaced under the same name is not noticed."""
    group_pattern: str | None = None
    """Regular expression that finds a record's group in the value of `group_id`, as its first group or the whole match,
    such as `^.{12}` for the patient in names of TCGA; null: the whole value."""

    def __post_init__(self) -> None:
        _check_pattern(self.group_pattern)
        known = (*RECORD_FIELDS, LABEL_NAME, IMAGE)
        for key in self.columns:
            is_coded = key.startswith(CODED_FIELD_PREFIX) and key != CODED_FIELD_PREFIX
            if key not in known and not is_coded:
                raise ValueError(
                    f"columns: {key!r} is not a field of a record; known: {', '.join(known)}, {CODED_FIELD_PREFIX}*"
                )
        if IMAGE in self.columns:
            if not self.uri.endswith(".parquet"):
                raise ValueError(f"columns: {IMAGE}: only a .parquet file can contain images, got {self.uri!r}")
            if "image_uri" in self.columns or self.images is not None:
                raise ValueError(f"columns: {IMAGE}: the table contains the images, so image_uri and images are unused")


@settings
class ImageFolder(SourceSettings):
    """Images in folders named by their labels: `label/name.jpg`, or in subfolders of the label."""

    renamed_keys: ClassVar[dict[str, str]] = {"group": "group_pattern"}

    kind: Literal["image_folder"] = "image_folder"
    uri: str
    """Folder of the label folders. It is listed completely; for millions of images write a table of their URIs."""
    group_pattern: str | None = None
    """Regular expression that finds an image's group in its file name, as for a table; null: each image is a group."""

    def __post_init__(self) -> None:
        _check_pattern(self.group_pattern)


@settings
class PanNuke(SourceSettings):
    """The folds of PanNuke (arXiv 2003.10778): patches of 256 x 256 pixels of 19 tissues, with masks of the nuclei."""

    renamed_keys: ClassVar[dict[str, str]] = {"nuclei": "measure_nuclei"}

    kind: Literal["pannuke"] = "pannuke"
    uri: str
    """A local folder that contains, at any depth, `fold1/images.npy`, `fold1/types.npy` and `fold1/masks.npy`, as in
    the published archives; the arrays are memory-mapped."""
    folds: dict[str, Split] = dataclasses.field(
        default_factory=lambda: {"fold1": "train", "fold2": "validation", "fold3": "test"}
    )
    """Split of each fold; other folds are not read."""
    measure_nuclei: bool = True
    """Describe each patch's nuclei in coded fields, from the masks: number, size, shape, spacing, number of each type;
    if false, no masks are needed."""

    def __post_init__(self) -> None:
        if "train" not in self.folds.values():
            raise ValueError(f"folds must name one to train on, got {self.folds}")


@settings
class Tiles(SourceSettings):
    """Tiles of histology images, or crops around single nuclei, with measurements of their nuclei."""

    renamed_keys: ClassVar[dict[str, str]] = {
        "pictures": "images",
        "cut": "tiling",
        "size": "tile_size",
        "most": "max_tiles_per_image",
    }

    kind: Literal["tiles"] = "tiles"
    images: Annotated[Table | ImageFolder, Field(discriminator="kind")]
    """The images: records with an image. Tiles inherit their label, group, split and coded fields."""
    masks: str | None = None
    """Location of the mask of each image, with `{}` in place of the image's record id, such as `masks/{}.png`: the
    number of the nucleus at each pixel, or a binary mask; a PNG, TIFF or `.npy`."""
    contours: str | None = None
    """Location of the contours of each image, as Aperio ImageScope saves them, such as `xml/{}.xml.gz`. They take
    precedence over a mask, because a mask does not separate touching nuclei. Without either nothing is measured."""
    tiling: Literal["grid", "nuclei"] = "grid"
    """`grid`: adjacent tiles from the upper left corner, without the remainder at the other edges; `nuclei`: crops
    around the centre of each nucleus."""
    tile_size: int = 250
    """Height and width of a tile, in pixels."""
    max_tiles_per_image: int | None = None
    """Maximum number of tiles of one image, drawn at random; null: all."""
    seed: int = 0
    """Seed of the draw of tiles."""
    max_bytes: int = 64_000_000
    """Maximum size of a file."""
    max_pixels: int = 64_000_000
    """Maximum height times width of an image."""

    def __post_init__(self) -> None:
        for name in ("tile_size", "max_bytes", "max_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.max_tiles_per_image is not None and self.max_tiles_per_image < 1:
            raise ValueError(f"max_tiles_per_image must be positive or null, got {self.max_tiles_per_image}")
        for name in ("masks", "contours"):
            if (getattr(self, name) or "{}").count("{}") != 1:
                raise ValueError(f"{name}: expected one {{}} for the image's record id, got {getattr(self, name)!r}")
        if self.tiling == "nuclei" and self.masks is None and self.contours is None:
            raise ValueError("tiling is nuclei, which needs masks or contours")


AnySource = Annotated[Phenopackets | Hpo | Table | ImageFolder | PanNuke | Tiles, Field(discriminator="kind")]
"""Settings of `prepare.source`, selected by `kind`."""
