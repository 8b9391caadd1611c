"""Run a prompt once for all its completions: one row is [prefix | completion 1 | completion 2 | ...]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mint_ray.layouts import Batch, Example, Logps, bookkeeping, integers, select_logps
from mint_ray.loading import UserError

PADDING, PREFIX = -1, 0
"""Segment of a column; completion i is segment i + 1."""


class SharedPrefixLayout:
    """One row per example, whose completions see the prefix and themselves but not each other.

    Rows are padded on both sides so that all prefixes end in one column: the columns whose logits any row needs then
    nearly coincide, and `logits_to_keep` can name them for the whole batch. Prefix sharing for DPO: arXiv 2410.20305.
    """

    name = "shared_prefix"

    def lay_out(self, examples: Sequence[Example], *, score_prompt: bool) -> Batch:
        """Tokens, positions, segments (B, W) and where to read each scored token's logit."""
        sequences = [[example.prompt_ids + completion for completion in example.completions] for example in examples]
        prefixes = [_common_prefix(row) for row in sequences]
        end = max(prefixes)
        width = end + max(
            sum(len(sequence) - prefix for sequence in row) for row, prefix in zip(sequences, prefixes, strict=True)
        )
        input_ids = torch.zeros((len(examples), width), dtype=torch.long)
        position_ids = torch.zeros_like(input_ids)
        segments = torch.full_like(input_ids, PADDING)
        completions: list[tuple[int, int]] = []  # cell (row, column) whose logit predicts the token ...
        completion_targets: list[int] = []  # ... and the token
        prompts: list[tuple[int, int]] = []
        prompt_targets: list[int] = []
        for row, (example, row_sequences, prefix) in enumerate(zip(examples, sequences, prefixes, strict=True)):
            start = end - prefix
            input_ids[row, start:end] = integers(row_sequences[0][:prefix])
            position_ids[row, start:end] = torch.arange(prefix)
            segments[row, start:end] = PREFIX
            prompt = len(example.prompt_ids)
            column = end
            for index, sequence in enumerate(row_sequences):
                stop = column + len(sequence) - prefix
                input_ids[row, column:stop] = integers(sequence[prefix:])
                # the restart: every completion stands right behind the prefix
                position_ids[row, column:stop] = torch.arange(prefix, len(sequence))
                segments[row, column:stop] = index + 1
                # the last prefix token predicts the first token behind it for every completion
                columns = [*range(start, end), *range(column, stop)]
                completions += [(row, at) for at in columns[prompt - 1 : -1]]
                completion_targets += sequence[prompt:]
                column = stop
            if score_prompt:
                prompts += [(row, at) for at in range(start, start + prompt - 1)]
                prompt_targets += example.prompt_ids[1:]
        cells = sorted({*completions, *prompts})
        kept = sorted({column for _, column in cells})
        index_of_cell = {cell: index for index, cell in enumerate(cells)}
        index_of_column = {column: index for index, column in enumerate(kept)}
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "segments": segments,
            "columns_K": integers(kept),
            "cell_row_M": integers([row for row, _ in cells]),
            "cell_column_M": integers([index_of_column[column] for _, column in cells]),
            "source_N": integers([index_of_cell[cell] for cell in completions]),
            "target_N": integers(completion_targets),
            "prompt_source_N": integers([index_of_cell[cell] for cell in prompts]),
            "prompt_target_N": integers(prompt_targets),
            **bookkeeping(examples, score_prompt=score_prompt, row_tokens=int((segments != PADDING).sum())),
        }

    def run(self, model: nn.Module, batch: Batch) -> Logps:
        """One forward pass; `lm_head` runs only on the columns that hold a needed logit.

        Raises UserError if the model's attention takes no 4-D mask.
        """
        logits_BKV = model(
            input_ids=batch["input_ids"],
            attention_mask=_attention_mask(model, batch["segments"]),
            position_ids=batch["position_ids"],
            logits_to_keep=batch["columns_K"],
            use_cache=False,
        ).logits
        logits_MV = logits_BKV[batch["cell_row_M"], batch["cell_column_M"]].float()
        scored = len(batch["source_N"])
        logps_N = select_logps(
            logits_MV,
            torch.cat([batch["source_N"], batch["prompt_source_N"]]),
            torch.cat([batch["target_N"], batch["prompt_target_N"]]),
        )
        return Logps(
            token_logps_N=logps_N[:scored],
            counts_C=batch["counts_C"],
            prompt_token_logps_N=logps_N[scored:],
            prompt_counts_B=batch["prompt_counts_B"],
        )


def visible(segments_BW: Tensor) -> Tensor:
    """Which key (last axis) a query may see: causal AND (key in the prefix OR same segment), shape (B, 1, W, W).

    Padding sees padding, so no query is left without a key, which would be NaN.
    """
    width = segments_BW.shape[1]
    causal_WW = torch.ones((width, width), dtype=torch.bool, device=segments_BW.device).tril()
    query, key = segments_BW[:, :, None], segments_BW[:, None, :]
    return (causal_WW & ((key == PREFIX) | (key == query)))[:, None]


def _attention_mask(model: nn.Module, segments_BW: Tensor) -> Tensor:
    mask = visible(segments_BW)
    attention = getattr(getattr(model, "module", model).config, "_attn_implementation", None)
    if attention == "sdpa":
        return mask
    if attention == "eager":
        return torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    raise UserError(f"attn_implementation {attention!r}: takes no 4-D mask, expected 'sdpa' or 'eager'")


def _common_prefix(sequences: list[list[int]]) -> int:
    """How many leading tokens all sequences share; boundary merges of a tokenizer only make it shorter."""
    low, high = min(sequences), max(sequences)  # what the first and last in order share, all share
    for index, (token, other) in enumerate(zip(low, high, strict=False)):
        if token != other:
            return index
    return len(low)
