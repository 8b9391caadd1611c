"""The examples of a training process: tokenized records by index, in an order that is the same on every worker."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from mint_ray.artifacts import Artifact, read_part
from mint_ray.config.loader import UserError
from mint_ray.images import read_images_ahead
from mint_ray.layouts import Example
from mint_ray.records import TokenizedRecord, from_dict, schema_of

if TYPE_CHECKING:
    from mint_ray.models.vision_processor import VisionProcessor

PARTS_PER_WINDOW = 16
"""Number of parts among which records are shuffled; at 1,024 records of 1,000 tokens per part they take 130 MB."""

MAX_IMAGES_AHEAD = 64
"""Maximum number of images decoded ahead of the training step, for any batch size; `FRAME` of
`models.vision_processor` bounds each to 12.6 MB."""


class Examples(Protocol):
    """The tokenized records of one split."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Return the example at `index` with its image, if it has one."""
        ...

    def read(self, index: int) -> Example:
        """Return the example at `index` without reading its image."""
        ...

    def add_images(self, batches: Iterable[list[Example]], *, max_ahead: int) -> Iterator[list[Example]]:
        """Yield the batches with the images of their examples, in order.

        Threads decode the images of the following examples, at most `max_ahead`. Close the iterator to stop them.
        """
        ...

    def order(self, rng: random.Random) -> list[int]:
        """Return all indices in a random order that depends on `rng` alone."""
        ...


class InMemoryExamples:
    """Examples in memory, with their images."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def read(self, index: int) -> Example:
        """Return the example at `index`, with its image."""
        return self._examples[index]

    def add_images(self, batches: Iterable[list[Example]], *, max_ahead: int) -> Iterator[list[Example]]:
        """Yield the batches unchanged."""
        yield from batches

    def order(self, rng: random.Random) -> list[int]:
        """Return all indices in a uniformly random order."""
        return rng.sample(range(len(self)), len(self))


class StoredExamples:
    """Examples in Parquet parts of `TokenizedRecord`; a process caches a few parts.

    Reading the examples of an `order` from start to end reads each part once, with at most one window of parts and one
    further part in memory. Pickling keeps the URIs of the parts, not their content.
    """

    def __init__(
        self,
        uris: Sequence[str],
        rows: Sequence[int],
        parts_per_window: int = PARTS_PER_WINDOW,
        vision_processor: VisionProcessor | None = None,
    ) -> None:
        """Describe the parts; nothing is read yet.

        Args:
            uris: URIs of the parts.
            rows: Number of records in each part.
            parts_per_window: Number of parts among which records are shuffled.
            vision_processor: The student's processor, for records with images.
        """
        self._uris, self._rows, self._parts_per_window = list(uris), list(rows), parts_per_window
        self._vision_processor = vision_processor
        self._ends = list(accumulate(rows))
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()

    @classmethod
    def from_artifact(
        cls, artifact: Artifact, table: str, vision_processor: VisionProcessor | None = None
    ) -> StoredExamples:
        """Return the records of one table, in the order of the manifest."""
        files = artifact.table_files(table)
        uris = [artifact.file_uri(file.path) for file in files]
        return cls(uris, [file.rows or 0 for file in files], vision_processor=vision_processor)

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredExamples, (self._uris, self._rows, self._parts_per_window, self._vision_processor)

    def __len__(self) -> int:
        return sum(self._rows)

    def __getitem__(self, index: int) -> Example:
        """Return the example at `index` with its image, if it has one.

        Raises UserError as `read` does, or if the image has changed since the record was tokenized.
        """
        example = self.read(index)
        return self._vision_processor.add_image(example) if self._vision_processor else example

    def read(self, index: int) -> Example:
        """Return the example at `index` without its image.

        Raises UserError if the record's part is missing or has other columns or another number of rows than expected.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        part = bisect_right(self._ends, index)
        row = index - self._ends[part] + self._rows[part]
        return to_example(from_dict(TokenizedRecord, self._part(part).slice(row, 1).to_pylist()[0]))

    def add_images(self, batches: Iterable[list[Example]], *, max_ahead: int) -> Iterator[list[Example]]:
        """Yield the batches with the images of their examples, in order; see `Examples.add_images`.

        Raises UserError naming record and URI if an image has changed since the record was tokenized.
        """
        if self._vision_processor is None:
            yield from batches
            return
        from mint_ray.models.vision_processor import FRAME

        items = ((example, left) for batch in batches for left, example in _countdown(batch))
        max_ahead = min(max_ahead, MAX_IMAGES_AHEAD)
        loaded: list[Example] = []
        with closing(read_images_ahead(items, FRAME, lambda item: item[0].image_uri, max_ahead=max_ahead)) as decoded:
            for (example, left), pixels in decoded:
                loaded.append(self._vision_processor.add_image(example, pixels))
                if left == 0:
                    yield loaded
                    loaded = []

    def order(self, rng: random.Random) -> list[int]:
        """Return all indices: parts in a random order, records shuffled among the parts of each window."""
        parts = rng.sample(range(len(self._rows)), len(self._rows))
        order: list[int] = []
        for first in range(0, len(parts), self._parts_per_window):
            window = [
                index
                for part in parts[first : first + self._parts_per_window]
                for index in range(self._ends[part] - self._rows[part], self._ends[part])
            ]
            rng.shuffle(window)
            order += window
        return order

    def _part(self, part: int) -> pa.Table:
        if part in self._cache:
            self._cache.move_to_end(part)
            return self._cache[part]
        # one more than a window: a step may span two windows
        if len(self._cache) > self._parts_per_window:
            self._cache.popitem(last=False)
        table = read_part(self._uris[part])
        if not table.schema.equals(schema_of(TokenizedRecord)):
            raise UserError(
                f"{self._uris[part]}: has the columns {', '.join(table.column_names)}, not those of tokenized records"
            )
        if len(table) != self._rows[part]:
            raise UserError(f"{self._uris[part]}: has {len(table)} rows, the manifest says {self._rows[part]}")
        self._cache[part] = table
        return table


def _countdown(batch: list[Example]) -> Iterator[tuple[int, Example]]:
    """Yield each example with the number of examples that follow it in its batch."""
    return zip(range(len(batch) - 1, -1, -1), batch, strict=True)


def to_example(row: TokenizedRecord) -> Example:
    """Return a stored record as an example."""
    return Example(
        record_id=row.record_id,
        prompt_ids=row.prompt_ids,
        completions=row.completions,
        pairs=[(chosen, rejected) for chosen, rejected in row.pairs],
        reference_logps=row.reference_logps,
        image_uri=row.image_uri,
    )


def to_row(example: Example) -> TokenizedRecord:
    """Return an example as a row of its table."""
    return TokenizedRecord(
        record_id=example.record_id,
        prompt_ids=example.prompt_ids,
        completions=example.completions,
        pairs=[list(pair) for pair in example.pairs],
        reference_logps=example.reference_logps,
        image_uri=example.image_uri,
    )
