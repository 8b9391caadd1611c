"""The layout that runs a prompt once for all its completions: rows [prefix | completion 1 | completion 2 | ...]."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mint_ray.layouts import Batch, Example, LogitsMode, Logps
from mint_ray.layouts.batches import int_tensor, pair_tensors
from mint_ray.layouts.images import collate_images, image_kwargs, model_position_ids, uses_cross_attention
from mint_ray.layouts.lm_head import logit_index, scored_logps
from mint_ray.layouts.masks import PADDING, PREFIX, attention_mask
from mint_ray.layouts.prefix import longest_common_prefix


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SharedPrefixLayout:
    """Rows in which a record's completions attend to its prefix and themselves, not to each other or other records.

    Prefix sharing for DPO: arXiv 2410.20305.
    """

    max_tokens_per_row: int | None = None
    """Pack records into rows of at most this many tokens; None gives each record its own row. A record that is longer
    gets its own row too."""
    logits: LogitsMode = "chunked"
    name: ClassVar[str] = "shared_prefix"

    def collate(self, examples: Sequence[Example], *, score_prompt: bool) -> Batch:
        """Return tokens, positions, segments and records (rows, W), and the position of each scored token's logit.

        `masked_Q` are the columns that need an explicit mask: before them a row has only its first record's prefix.
        `prefixes_B4` are record, row, first column and length of every prefix, row by row from left to right.
        """
        sequences = [_share_prefix(example) for example in examples]
        # a row's tokens would cross-attend to all images of the row
        packs = self.max_tokens_per_row is not None and not any(map(uses_cross_attention, examples))
        slots = _pack(sequences, self.max_tokens_per_row or 0) if packs else _one_per_row(sequences)
        # a model fills the image tokens of a batch row by row, from left to right
        in_rows = sorted(range(len(examples)), key=lambda record: (slots[record].row, slots[record].prefix))
        prefixes = [
            [record, slots[record].row, slots[record].prefix, len(sequences[record].prefix_ids)] for record in in_rows
        ]
        tokens = _token_tensors(sequences, slots)
        input_ids = tokens["input_ids"]
        width = input_ids.shape[1]
        return {
            **tokens,
            "prefixes_B4": int_tensor(prefixes),
            **collate_images(input_ids, [examples[record] for record in in_rows]),
            "masked_Q": torch.arange(min(slot.suffix for slot in slots if slot.prefix == 0), width),
            **_logit_index(examples, sequences, slots, width=width, score_prompt=score_prompt),
            **pair_tensors(examples, score_prompt=score_prompt, num_tokens=sum(map(len, sequences))),
        }

    def compute_logps(self, model: nn.Module, batch: Batch) -> Logps:
        """Run one forward pass. Raises UserError if the model's attention does not support a custom mask."""
        inputs = {
            "input_ids": batch["input_ids"],
            "attention_mask": attention_mask(model, batch),
            "position_ids": model_position_ids(model, batch),
            "use_cache": False,
            **image_kwargs(batch),
        }
        return scored_logps(model, inputs, batch, self.logits)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Sequence:
    """The tokens of one record: the shared prefix, then the remaining tokens of each completion."""

    prefix_ids: list[int]
    suffix_ids: list[int]
    suffix_positions: list[int]
    suffix_segments: list[int]

    def __len__(self) -> int:
        return len(self.prefix_ids) + len(self.suffix_ids)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Slot:
    """Place of a sequence in the batch."""

    row: int
    prefix: int
    """First column of the prefix."""
    suffix: int
    """First column of the suffix."""


def _share_prefix(example: Example) -> _Sequence:
    sequences = [example.prompt_ids + completion for completion in example.completions]
    # the prompt and any tokens that all completions start with
    prefix = len(longest_common_prefix(sequences))
    return _Sequence(
        prefix_ids=sequences[0][:prefix],
        suffix_ids=[token for sequence in sequences for token in sequence[prefix:]],
        # positions restart: every completion directly follows the prefix
        suffix_positions=[position for sequence in sequences for position in range(prefix, len(sequence))],
        suffix_segments=[
            segment for segment, sequence in enumerate(sequences, PREFIX + 1) for _ in range(prefix, len(sequence))
        ],
    )


def _one_per_row(sequences: list[_Sequence]) -> list[_Slot]:
    """Place each sequence in its own row, with all prefixes and all suffixes left-aligned in one column each."""
    suffix = max(len(sequence.prefix_ids) for sequence in sequences)
    return [_Slot(row=row, prefix=0, suffix=suffix) for row in range(len(sequences))]


def _pack(sequences: list[_Sequence], max_tokens_per_row: int) -> list[_Slot]:
    """Pack by first-fit decreasing: the longest first, each into the first row with room."""
    slots: dict[int, _Slot] = {}
    used: list[int] = []
    for index in sorted(range(len(sequences)), key=lambda index: -len(sequences[index])):
        sequence = sequences[index]
        fitting = (row for row, tokens in enumerate(used) if tokens + len(sequence) <= max_tokens_per_row)
        row = next(fitting, len(used))
        if row == len(used):
            used.append(0)
        slots[index] = _Slot(row=row, prefix=used[row], suffix=used[row] + len(sequence.prefix_ids))
        used[row] += len(sequence)
    return [slots[index] for index in range(len(sequences))]


def _token_tensors(sequences: list[_Sequence], slots: list[_Slot]) -> dict[str, Tensor]:
    """Return `input_ids`, `position_ids`, `segments` and `records`, each (rows, W)."""
    rows = 1 + max(slot.row for slot in slots)
    width = max(slot.suffix + len(sequence.suffix_ids) for slot, sequence in zip(slots, sequences, strict=True))
    input_ids = torch.zeros((rows, width), dtype=torch.long)
    position_ids = torch.zeros_like(input_ids)
    segments = torch.full_like(input_ids, PADDING)
    records = torch.full_like(input_ids, PADDING)
    for record, (sequence, slot) in enumerate(zip(sequences, slots, strict=True)):
        row = slot.row
        prefix = slice(slot.prefix, slot.prefix + len(sequence.prefix_ids))
        suffix = slice(slot.suffix, slot.suffix + len(sequence.suffix_ids))
        input_ids[row, prefix] = int_tensor(sequence.prefix_ids)
        input_ids[row, suffix] = int_tensor(sequence.suffix_ids)
        position_ids[row, prefix] = torch.arange(len(sequence.prefix_ids))
        position_ids[row, suffix] = int_tensor(sequence.suffix_positions)
        segments[row, prefix] = PREFIX
        segments[row, suffix] = int_tensor(sequence.suffix_segments)
        records[row, prefix] = records[row, suffix] = record
    return {"input_ids": input_ids, "position_ids": position_ids, "segments": segments, "records": records}


def _logit_index(
    examples: Sequence[Example], sequences: list[_Sequence], slots: list[_Slot], *, width: int, score_prompt: bool
) -> Batch:
    positions: list[int] = []
    targets: list[int] = []
    prompt_positions: list[int] = []
    prompt_targets: list[int] = []
    for example, sequence, slot in zip(examples, sequences, slots, strict=True):
        prefix_start = slot.row * width + slot.prefix
        first = slot.row * width + slot.suffix
        # tokens of the completions that lie in the prefix are predicted there
        in_prefix = range(prefix_start + len(example.prompt_ids) - 1, prefix_start + len(sequence.prefix_ids))
        for completion in example.completions:
            in_suffix = len(example.prompt_ids) + len(completion) - len(sequence.prefix_ids)
            # the last prefix token predicts the first suffix token of every completion
            positions += [*in_prefix, *range(first, first + in_suffix)][: len(completion)]
            targets += completion
            first += in_suffix
        if score_prompt:
            prompt_positions += [prefix_start + index - 1 for index in example.scored_prompt_indices]
            prompt_targets += [example.prompt_ids[index] for index in example.scored_prompt_indices]
    return logit_index(positions, targets, prompt_positions, prompt_targets)
