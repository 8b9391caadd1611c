"""Sources of records: phenopackets, simulated patients, tables, folders of images, and histology images."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, assert_never, runtime_checkable

from mint_ray.records import Record
from mint_ray.sources.config import AnySource, Hpo, ImageFolder, PanNuke, Phenopackets, Table, Tiles


@dataclass(frozen=True)
class BadRow:
    """A row that could not be converted to a record."""

    location: str
    """File and row, such as `cases.jsonl:17`."""
    reason: str
    """One word in snake_case; the manifest counts rows by reason."""
    message: str
    """One line naming file, row, field and value."""


class Source(Protocol):
    """Reads records in a fixed order; the same input gives the same records."""

    def inputs(self) -> dict[str, str]:
        """Return the identity of the input, such as `{uri: sha256}`. Raises UserError if the input is missing."""

    def read(self) -> Iterator[Record | BadRow]:
        """Yield every row in order, as a record or as the reason why it is none.

        Raises UserError for a file that cannot be read at all.
        """

    def labels(self) -> dict[str, list[str]]:
        """Return the names of every label in the records, by label id; the first name is the preferred one."""


@runtime_checkable
class ImageSource(Protocol):
    """A source whose images are not files of their own, so that they are stored with the records."""

    def image_bytes(self, record: Record) -> bytes:
        """Return the encoded image of a record of this source. Raises ImageError if it cannot be read."""


def find_group(pattern: str, text: str) -> str | None:
    """Return what the pattern's first group matches in `text`, or the whole match; None if that is empty."""
    found = re.search(pattern, text)
    if found is None:
        return None
    return (found[1] if found.re.groups else found[0]) or None


def build_source(config: AnySource) -> Source:
    """Build the source of the settings. Raises UserError if its file or folder is missing."""
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
