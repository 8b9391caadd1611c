"""Greedy decoding of a batch of prompts: a common prefix runs once, and finished sequences leave the batch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mint_ray.layouts.prefix import longest_common_prefix

PREALLOCATED_TOKENS = 64
"""Number of tokens for which a cache layer allocates memory ahead."""
TOKENS_PER_ROUND = 16
"""Number of new tokens after which finished sequences are removed from the batch."""


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer in a buffer that is larger than needed: a new token is written without a copy.

    transformers' own layer copies all keys and values for each token, which takes longer than the computation itself.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.keys: Any
        self.values: Any
        self.buffers: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens; return all of them, (rows, heads, tokens, head size)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._append("keys", self.keys, key_states), self._append("values", self.values, value_states)
        self.keys, self.values = keys, values
        return keys, values

    def _append(self, name: str, current: Tensor, new: Tensor) -> Tensor:
        start = current.shape[-2] if current.numel() else 0
        end = start + new.shape[-2]
        buffer = self.buffers.get(name)
        # after a change of the batch, `current` is another tensor than the start of the buffer
        if buffer is None or buffer.data_ptr() != current.data_ptr() or buffer.shape[-2] < end:
            buffer = new.new_empty((*new.shape[:-2], end + PREALLOCATED_TOKENS, new.shape[-1]))
            if start:
                buffer[..., :start, :] = current
            self.buffers[name] = buffer
        buffer[..., start:end, :] = new
        return buffer[..., :end, :]


def prefill(model: Any, prompt_ids: Sequence[list[int]], pad_id: int) -> dict[str, Any]:
    """Return inputs for `model.generate`: `input_ids` and `attention_mask` (B, W), and a cache of the common prefix.

    The longest common prefix of the prompts is run once; padding is placed after it. A model whose layers do not store
    all keys and values gets no cache.
    """
    layers = DynamicCache(config=model.config).layers
    is_plain = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
    # at least one token of each prompt has to run in `generate`
    shared = min(len(longest_common_prefix(prompt_ids)), min(map(len, prompt_ids)) - 1) if is_plain else 0
    width = max(map(len, prompt_ids))
    ids_BW = [[*ids[:shared], *[pad_id] * (width - len(ids)), *ids[shared:]] for ids in prompt_ids]
    mask_BW = [[1] * shared + [0] * (width - len(ids)) + [1] * (len(ids) - shared) for ids in prompt_ids]
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor(ids_BW, device=model.device),
        "attention_mask": torch.tensor(mask_BW, device=model.device),
    }
    if is_plain:
        cache = DynamicCache(config=model.config)
        cache.layers = [PreallocatedLayer() for _ in layers]
        if shared:
            prefix_1P = inputs["input_ids"][:1, :shared]
            model(input_ids=prefix_1P, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(len(prompt_ids))
        inputs["past_key_values"] = cache
    return inputs


def decode_greedily(
    model: Any, prompt_ids: Sequence[list[int]], *, pad_id: int, eos_ids: Collection[int], max_new_tokens: int
) -> list[list[int]]:
    """Return the most likely tokens after each prompt, up to `max_new_tokens` or the first of `eos_ids`, excluded.

    The tokens are those of `model.generate` with the model's generation config.
    """
    inputs = prefill(model, prompt_ids, pad_id)
    cache = inputs.get("past_key_values")
    per_round = max_new_tokens if cache is None else TOKENS_PER_ROUND
    completions: list[list[int]] = [[] for _ in prompt_ids]
    rows = list(range(len(prompt_ids)))  # the prompt of each sequence that is not finished
    for done in range(0, max_new_tokens, per_round):
        output_BT = model.generate(**inputs, max_new_tokens=min(per_round, max_new_tokens - done))
        unfinished: list[int] = []
        for index, new in enumerate(output_BT[:, inputs["input_ids"].shape[1] :].tolist()):
            end = next((position for position, token in enumerate(new) if token in eos_ids), None)
            completions[rows[index]] += new[:end]
            if end is None:
                unfinished.append(index)
        if not unfinished:
            break
        kept_B = torch.tensor(unfinished, device=output_BT.device)
        if cache is not None and len(unfinished) < len(rows):
            cache.batch_select_indices(kept_B)
        ids_BT, mask_BW = output_BT[kept_B], inputs["attention_mask"][kept_B]
        new_mask_BN = mask_BW.new_ones(len(unfinished), ids_BT.shape[1] - mask_BW.shape[1])
        inputs |= {"input_ids": ids_BT, "attention_mask": torch.cat([mask_BW, new_mask_BN], dim=1)}
        rows = [rows[index] for index in unfinished]
    return completions
