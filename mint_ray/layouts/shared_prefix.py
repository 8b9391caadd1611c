"""Run a prompt once for all its completions: a row holds [prefix | completion 1 | completion 2 | ...] of records."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from mint_ray.layouts import Batch, Example, Head, Logps, bookkeeping, integers
from mint_ray.layouts.head import run_scored, scored_cells
from mint_ray.layouts.images import image_inputs, is_crossed, lay_images, positions
from mint_ray.layouts.masks import PADDING, PREFIX, attention_mask


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SharedPrefixLayout:
    """Rows in which a record's completions see its prefix and themselves, but neither each other nor other records.

    Prefix sharing for DPO: arXiv 2410.20305.
    """

    row_tokens: int | None = None
    """Records are packed into rows of up to so many tokens; None gives each record a row, as too long a one has."""
    head: Head = "chunked"
    name: ClassVar[str] = "shared_prefix"

    def lay_out(self, examples: Sequence[Example], *, score_prompt: bool) -> Batch:
        """Tokens, positions, segments and records (rows, W) and where to read each scored token's logit.

        `masked_Q` are the columns that need a mask: up to them a row holds only its first record's prefix.
        `prefixes_B4` are record, row, first column and length of every prefix, row by row from left to right.
        """
        strips = [_strip(example) for example in examples]
        # cross-attention looks at all images of its row, also from ahead of them
        packs = self.row_tokens is not None and not any(map(is_crossed, examples))
        places = _pack(strips, self.row_tokens or 0) if packs else _stack(strips)
        rows = 1 + max(place.row for place in places)
        width = max(place.rest + len(strip.rest_ids) for place, strip in zip(places, strips, strict=True))
        input_ids = torch.zeros((rows, width), dtype=torch.long)
        position_ids = torch.zeros_like(input_ids)
        segments = torch.full_like(input_ids, PADDING)
        records = torch.full_like(input_ids, PADDING)
        cells: list[int] = []
        targets: list[int] = []
        prompt_cells: list[int] = []
        prompt_targets: list[int] = []
        for record, (example, strip, place) in enumerate(zip(examples, strips, places, strict=True)):
            row = place.row
            prefix = slice(place.prefix, place.prefix + len(strip.prefix_ids))
            rest = slice(place.rest, place.rest + len(strip.rest_ids))
            input_ids[row, prefix] = integers(strip.prefix_ids)
            input_ids[row, rest] = integers(strip.rest_ids)
            position_ids[row, prefix] = torch.arange(len(strip.prefix_ids))
            position_ids[row, rest] = integers(strip.rest_positions)
            segments[row, prefix] = PREFIX
            segments[row, rest] = integers(strip.rest_segments)
            records[row, prefix] = records[row, rest] = record
            at = row * width
            scored = range(at + prefix.start + len(example.prompt_ids) - 1, at + prefix.stop)
            first = at + place.rest
            for completion in example.completions:
                own = len(example.prompt_ids) + len(completion) - len(strip.prefix_ids)
                # the last prefix token predicts the first token behind it for every completion
                cells += [*scored, *range(first, first + own)][: len(completion)]
                targets += completion
                first += own
            if score_prompt:
                prompt_cells += [at + prefix.start + index - 1 for index in example.scored_prompt]
                prompt_targets += [example.prompt_ids[index] for index in example.scored_prompt]
        # a model fills the image tokens of a batch row by row, from left to right
        in_rows = sorted(range(len(examples)), key=lambda record: (places[record].row, places[record].prefix))
        prefixes = [
            [record, places[record].row, places[record].prefix, len(strips[record].prefix_ids)] for record in in_rows
        ]
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "segments": segments,
            "records": records,
            "prefixes_B4": integers(prefixes),
            **lay_images(input_ids, [examples[record] for record in in_rows]),
            "masked_Q": torch.arange(min(place.rest for place in places if place.prefix == 0), width),
            **scored_cells(cells, targets, prompt_cells, prompt_targets),
            **bookkeeping(examples, score_prompt=score_prompt, row_tokens=sum(map(len, strips))),
        }

    def run(self, model: nn.Module, batch: Batch) -> Logps:
        """One forward pass. Raises UserError if the model's attention takes no mask of ours."""
        inputs = {
            "input_ids": batch["input_ids"],
            "attention_mask": attention_mask(model, batch),
            "position_ids": positions(model, batch),
            "use_cache": False,
            **image_inputs(batch),
        }
        return run_scored(model, inputs, batch, self.head)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Strip:
    """One record's tokens: the prefix, then what each completion has of its own."""

    prefix_ids: list[int]
    rest_ids: list[int]
    rest_positions: list[int]
    rest_segments: list[int]

    def __len__(self) -> int:
        return len(self.prefix_ids) + len(self.rest_ids)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a strip stands."""

    row: int
    prefix: int
    """First column of the prefix."""
    rest: int
    """First column behind it."""


def _strip(example: Example) -> _Strip:
    sequences = [example.prompt_ids + completion for completion in example.completions]
    # at least the prompt, and whatever tokens all completions begin with
    prefix = _common_prefix(sequences)
    return _Strip(
        prefix_ids=sequences[0][:prefix],
        rest_ids=[token for sequence in sequences for token in sequence[prefix:]],
        # the restart: every completion stands right behind the prefix
        rest_positions=[position for sequence in sequences for position in range(prefix, len(sequence))],
        rest_segments=[
            segment for segment, sequence in enumerate(sequences, PREFIX + 1) for _ in range(prefix, len(sequence))
        ],
    )


def _stack(strips: list[_Strip]) -> list[_Place]:
    """A row for each; all prefixes begin in one column, and what is behind them in another."""
    rest = max(len(strip.prefix_ids) for strip in strips)
    return [_Place(row=row, prefix=0, rest=rest) for row in range(len(strips))]


def _pack(strips: list[_Strip], row_tokens: int) -> list[_Place]:
    """First-fit decreasing: the longest first, each in the first row with room."""
    places: dict[int, _Place] = {}
    used: list[int] = []
    for index in sorted(range(len(strips)), key=lambda index: -len(strips[index])):
        strip = strips[index]
        row = next((row for row, tokens in enumerate(used) if tokens + len(strip) <= row_tokens), len(used))
        if row == len(used):
            used.append(0)
        places[index] = _Place(row=row, prefix=used[row], rest=used[row] + len(strip.prefix_ids))
        used[row] += len(strip)
    return [places[index] for index in range(len(strips))]


def _common_prefix(sequences: list[list[int]]) -> int:
    """How many leading tokens all sequences share; boundary merges of a tokenizer only make it shorter."""
    low, high = min(sequences), max(sequences)  # what the first and last in order share, all share
    for index, (token, other) in enumerate(zip(low, high, strict=False)):
        if token != other:
            return index
    return len(low)
