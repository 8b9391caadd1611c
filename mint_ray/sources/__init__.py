"""Where records come from: phenopackets, made-up patients, tables, folders of images, pictures of tissue."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, assert_never, runtime_checkable

from mint_ray.records import Record
from mint_ray.sources.config import AnySource, Hpo, ImageFolder, PanNuke, Phenopackets, Table, Tiles


@dataclass(frozen=True)
class BadRow:
    """A row that became no record, and why."""

    where: str
    """File and row, such as `cases.jsonl:17`."""
    reason: str
    """One word in snake_case, counted in the manifest."""
    message: str
    """One line naming file, row, field and value."""


class Source(Protocol):
    """Reads records in a fixed order; the same input gives the same records."""

    def inputs(self) -> dict[str, str]:
        """Identity of what is read, such as `{uri: sha256}`. Raises UserError when it is missing."""

    def read(self) -> Iterator[Record | BadRow]:
        """Every row, readable or not, in order. Raises UserError for a file that cannot be read at all."""

    def labels(self) -> dict[str, list[str]]:
        """Names of every label met in the records, by label id; the first is the preferred one."""


@runtime_checkable
class Illustrator(Protocol):
    """A source whose images lie in no files of their own, so that they are kept with the records."""

    def draw(self, record: Record) -> bytes:
        """The image of a record that this source has read, encoded. Raises ImageError if there is none to be had."""


def find_group(pattern: str, text: str) -> str | None:
    """What the pattern's first bracket matches in `text`, or the pattern if it has none; None if that is nothing."""
    found = re.search(pattern, text)
    if found is None:
        return None
    return (found[1] if found.re.groups else found[0]) or None


def build_source(config: AnySource) -> Source:
    """The source that `config` describes. Raises UserError when its file or folder is missing."""
    match config:
        case Phenopackets():
            from mint_ray.sources.phenopackets import PhenopacketsSource

            return PhenopacketsSource(config)
        case Hpo():
            from mint_ray.sources.hpo import HpoSource

            return HpoSource(config)
        case Table():
            from mint_ray.sources.table import TableSource

            return TableSource(config)
        case ImageFolder():
            from mint_ray.sources.image_folder import ImageFolderSource

            return ImageFolderSource(config)
        case PanNuke():
            from mint_ray.sources.pannuke import PanNukeSource

            return PanNukeSource(config)
        case Tiles():
            from mint_ray.sources.tiles import TilesSource

            return TilesSource(config)
        case _:
            assert_never(config)
