"""Tokenised records where a training process finds them: by index, in an order that every process works out alike."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from mint_ray.artifacts import Artifact, read_part
from mint_ray.config.loader import UserError
from mint_ray.layouts import Example
from mint_ray.records import TokenizedRecord, from_dict, schema_of

if TYPE_CHECKING:
    from mint_ray.models.vision_processor import Sight

PARTS_PER_WINDOW = 16
"""Records are shuffled among so many parts; at up to 1,024 records of a thousand tokens a part these take 130 MB."""


class Examples(Protocol):
    """Tokenised records of one split."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def order(self, rng: random.Random) -> list[int]:
        """Every index once, in an order drawn from `rng` alone."""
        ...


class InMemory:
    """Examples held whole by the process."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def order(self, rng: random.Random) -> list[int]:
        return rng.sample(range(len(self)), len(self))


class StoredExamples:
    """Examples in Parquet parts of `TokenizedRecord`, of which a process holds a few at a time.

    An order that is walked from its begin to its end reads each part once, and never has more than one window of parts
    and one part besides in memory. Pickled, it takes along where the parts lie but none of them.
    """

    def __init__(
        self,
        uris: Sequence[str],
        rows: Sequence[int],
        parts_per_window: int = PARTS_PER_WINDOW,
        sight: Sight | None = None,
    ) -> None:
        """`rows` says how many records each part has; `sight` reads a record's image when the record is asked for."""
        self._uris, self._rows, self._parts_per_window = list(uris), list(rows), parts_per_window
        self._sight = sight
        self._ends = list(accumulate(rows))
        self._held: OrderedDict[int, pa.Table] = OrderedDict()

    @classmethod
    def of(cls, artifact: Artifact, table: str, sight: Sight | None = None) -> StoredExamples:
        """The records of one table, in the order of the manifest."""
        files = artifact.table_files(table)
        return cls([artifact.file_uri(file.path) for file in files], [file.rows or 0 for file in files], sight=sight)

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredExamples, (self._uris, self._rows, self._parts_per_window, self._sight)

    def __len__(self) -> int:
        return sum(self._rows)

    def __getitem__(self, index: int) -> Example:
        """Raises UserError if the record's part is missing, or has other columns or rows than it should, or if the
        record's image is no longer what it was when the record was tokenised."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        part = bisect_right(self._ends, index)
        row = index - self._ends[part] + self._rows[part]
        example = to_example(from_dict(TokenizedRecord, self._part(part).slice(row, 1).to_pylist()[0]))
        return self._sight.show(example) if self._sight else example

    def order(self, rng: random.Random) -> list[int]:
        """Every index once: parts are shuffled, then the records among the parts of each window."""
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
        if part in self._held:
            self._held.move_to_end(part)
            return self._held[part]
        # one more than a window: a step may reach over into the next one
        if len(self._held) > self._parts_per_window:
            self._held.popitem(last=False)
        table = read_part(self._uris[part])
        if not table.schema.equals(schema_of(TokenizedRecord)):
            raise UserError(
                f"{self._uris[part]}: has the columns {', '.join(table.column_names)}, not tokenised records"
            )
        if len(table) != self._rows[part]:
            raise UserError(f"{self._uris[part]}: has {len(table)} rows, the manifest says {self._rows[part]}")
        self._held[part] = table
        return table


def to_example(row: TokenizedRecord) -> Example:
    """A stored record as the layouts take it."""
    return Example(
        record_id=row.record_id,
        prompt_ids=row.prompt_ids,
        completions=row.completions,
        pairs=[(chosen, rejected) for chosen, rejected in row.pairs],
        reference_logps=row.reference_logps,
        image_uri=row.image_uri,
    )


def to_row(example: Example) -> TokenizedRecord:
    """The same record as it is stored."""
    return TokenizedRecord(
        record_id=example.record_id,
        prompt_ids=example.prompt_ids,
        completions=example.completions,
        pairs=[list(pair) for pair in example.pairs],
        reference_logps=example.reference_logps,
        image_uri=example.image_uri,
    )
