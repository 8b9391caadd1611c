"""Let a model answer many prompts at once: what they begin alike runs once, and a row that has ended is let go."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mint_ray.students.constrained_decoding import shared_prefix

ROOM = 64
"""Tokens for which a layer keeps room ahead."""
STRETCH = 16
"""New tokens after which rows that have ended are let go."""


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, with room behind them: a new token is written there, and no other is copied.

    transformers' own layer copies all of them for each token, which for a batch takes longer than the arithmetic.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.keys: Any
        self.values: Any
        self.rooms: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values up to the new ones, (rows, heads, tokens, size of a head)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._add("keys", self.keys, key_states), self._add("values", self.values, value_states)
        self.keys, self.values = keys, values
        return keys, values

    def _add(self, side: str, held: Tensor, new: Tensor) -> Tensor:
        start = held.shape[-2] if held.numel() else 0
        end = start + new.shape[-2]
        room = self.rooms.get(side)
        # other rows than those that the room was made for lie elsewhere
        if room is None or room.data_ptr() != held.data_ptr() or room.shape[-2] < end:
            room = new.new_empty((*new.shape[:-2], end + ROOM, new.shape[-1]))
            if start:
                room[..., :start, :] = held
            self.rooms[side] = room
        room[..., start:end, :] = new
        return room[..., :end, :]


def begin_answers(model: Any, prompt_ids: Sequence[list[int]], pad_id: int) -> dict[str, Any]:
    """What `model.generate` goes on from: `input_ids` and `attention_mask` (B, W), and a cache.

    Tokens that all prompts begin with have been run, once for all; padding stands behind them. Of a model with layers
    that keep something other than all keys and values nothing has been run, and it has no cache.
    """
    layers = DynamicCache(config=model.config).layers
    is_plain = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
    # each has a token of its own left to run
    shared = min(len(shared_prefix(prompt_ids)), min(map(len, prompt_ids)) - 1) if is_plain else 0
    width = max(map(len, prompt_ids))
    ids_BW = [[*ids[:shared], *[pad_id] * (width - len(ids)), *ids[shared:]] for ids in prompt_ids]
    mask_BW = [[1] * shared + [0] * (width - len(ids)) + [1] * (len(ids) - shared) for ids in prompt_ids]
    begun: dict[str, Any] = {
        "input_ids": torch.tensor(ids_BW, device=model.device),
        "attention_mask": torch.tensor(mask_BW, device=model.device),
    }
    if is_plain:
        cache = DynamicCache(config=model.config)
        cache.layers = [RoomyLayer() for _ in layers]
        if shared:
            prefix_1P = begun["input_ids"][:1, :shared]
            model(input_ids=prefix_1P, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(len(prompt_ids))
        begun["past_key_values"] = cache
    return begun


def decode_greedily(
    model: Any, prompt_ids: Sequence[list[int]], *, pad_id: int, end_ids: Collection[int], max_new_tokens: int
) -> list[list[int]]:
    """The likeliest tokens behind each prompt, up to the first of `end_ids`, which is left out, or `max_new_tokens`.

    `model.generate` does it, by the model's own settings.
    """
    begun = begin_answers(model, prompt_ids, pad_id)
    cache = begun.get("past_key_values")
    stretch = max_new_tokens if cache is None else STRETCH
    answers: list[list[int]] = [[] for _ in prompt_ids]
    rows = list(range(len(prompt_ids)))
    for done in range(0, max_new_tokens, stretch):
        output_BT = model.generate(**begun, max_new_tokens=min(stretch, max_new_tokens - done))
        going: list[int] = []
        for place, new in enumerate(output_BT[:, begun["input_ids"].shape[1] :].tolist()):
            end = next((index for index, token in enumerate(new) if token in end_ids), None)
            answers[rows[place]] += new[:end]
            if end is None:
                going.append(place)
        if not going:
            break
        kept_B = torch.tensor(going, device=output_BT.device)
        if cache is not None and len(going) < len(rows):
            cache.batch_select_indices(kept_B)
        ids_BT, mask_BW = output_BT[kept_B], begun["attention_mask"][kept_B]
        seen_BN = mask_BW.new_ones(len(going), ids_BT.shape[1] - mask_BW.shape[1])
        begun |= {"input_ids": ids_BT, "attention_mask": torch.cat([mask_BW, seen_BN], dim=1)}
        rows = [rows[place] for place in going]
    return answers
