"""The attention mask of rows with shared prefixes, in the form that each attention implementation accepts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mint_ray.config.loader import UserError
from mint_ray.layouts import Batch
from mint_ray.layouts.images import attends_within_images, image_numbers

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

PADDING, PREFIX = -1, 0
"""Segment of a token; completion i of its record is segment i + 1. Padding belongs to record -1."""

SPLIT_SDPA = "mint_ray_split_sdpa"
"""Name under which `split_sdpa` is registered with transformers."""

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""A mask as FlexAttention defines it: row, head, query column, key column -> True if the query attends to the key."""


def shared_prefix_mask_mod(batch: Batch, window: int | None = None, images: Tensor | None = None) -> MaskMod:
    """Return the rule: same record AND causal AND (key in the prefix OR same segment) AND within the window.

    Padding attends to itself, so that no query is without a key, which would be NaN.

    Args:
        batch: A batch of the shared-prefix layout; `records`, `segments` and `position_ids` (rows, W) are read.
        window: Keys are fewer than this many positions away; None is no limit.
        images: Image numbers (rows, W) as `layouts.images.image_numbers` returns them, for models whose image tokens
            attend to each other in both directions.
    """
    records, segments, positions = batch["records"], batch["segments"], batch["position_ids"]

    def mask_mod(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        segment = segments[row, key]
        allowed = query >= key
        if images is not None:
            allowed = allowed | ((images[row, query] == images[row, key]) & (images[row, key] >= 0))
        allowed = allowed & (records[row, query] == records[row, key])
        allowed = allowed & ((segment == PREFIX) | (segment == segments[row, query]))
        if window is not None:
            allowed = allowed & (positions[row, query] - positions[row, key] < window)
        return allowed

    return mask_mod


def attention_mask(model: nn.Module, batch: Batch) -> Any:
    """Return the `attention_mask` argument of a transformers model: one mask, or one for each type of layer.

    Sliding windows are measured in positions, which restart after the prefix, so that they span as many tokens as in
    rows of one completion. Raises UserError for attention that does not support such a mask.
    """
    config, attention = _text_config(model), get_attn_implementation(model)
    window = getattr(config, "sliding_window", None)
    images = image_numbers(batch["is_image"]) if "is_image" in batch and attends_within_images(model) else None
    layer_types = set(getattr(config, "layer_types", None) or ())
    if unknown := layer_types - {"full_attention", "sliding_attention"}:
        raise UserError(f"layer_types {', '.join(sorted(unknown))!r}: does not support a custom attention mask")
    if "sliding_attention" in layer_types:
        windows = {"full_attention": None, "sliding_attention": window}
        return {kind: _mask(attention, batch, windows[kind], images) for kind in sorted(layer_types)}
    # models with a single type of layer, such as Mistral, slide in all layers or in none
    return _mask(attention, batch, None if layer_types else window, images)


def dense_mask(batch: Batch, mask_mod: MaskMod, queries_Q: Tensor | None = None) -> Tensor:
    """Return a mask as a boolean tensor (rows, 1, Q, W), for all query columns or for `queries_Q`."""
    rows, width = batch["input_ids"].shape
    device = batch["input_ids"].device
    row, key = torch.arange(rows, device=device), torch.arange(width, device=device)
    query = key if queries_Q is None else queries_Q
    return mask_mod(row[:, None, None, None], row[:1], query[:, None], key)


def split_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Compute sdpa attention with a mask that covers only the last queries; the queries before them are causal.

    The causal kernel skips masked keys, half of the work; a kernel with an explicit mask does not. Tensors have shape
    (rows, heads, W, head size), the mask (rows, 1, Q, W) with Q <= W.
    """
    first = 0 if attention_mask is None else query.shape[2] - attention_mask.shape[2]
    if first == 0:
        masked: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return masked
    options["is_causal"] = True
    prefix, _ = sdpa_attention_forward(
        module, query[:, :, :first], key[:, :, :first], value[:, :, :first], None, **options
    )
    if first == query.shape[2]:
        return prefix, None
    suffix, _ = sdpa_attention_forward(module, query[:, :, first:], key, value, attention_mask, **options)
    return torch.cat([prefix, suffix], dim=1), None


def get_attn_implementation(model: nn.Module) -> str | None:
    """Return the attention implementation of the model's text layers."""
    return getattr(_text_config(model), "_attn_implementation", None)


def set_attn_implementation(model: nn.Module, attention: str | None) -> None:
    """Set the attention implementation of the model's text layers, to one of transformers' or to `SPLIT_SDPA`.

    A vision encoder keeps its own. Raises UserError if the text layers cannot be identified.
    """
    if attention == get_attn_implementation(model):
        return
    AttentionInterface.register(SPLIT_SDPA, split_sdpa)
    AttentionMaskInterface.register(SPLIT_SDPA, sdpa_mask)
    text = _text_config(model)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.config is text:
            part.set_attn_implementation(attention)
            return
    raise UserError(f"attn_implementation {attention!r}: {type(model).__name__} has no layers of its text config")


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "module", model).config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _mask(attention: str | None, batch: Batch, window: int | None, images: Tensor | None) -> Tensor | BlockMask:
    mask_mod = shared_prefix_mask_mod(batch, window, images)
    rows, width = batch["input_ids"].shape
    device = batch["input_ids"].device
    if attention == SPLIT_SDPA:
        is_causal = images is None and (window is None or width - len(batch["masked_Q"]) <= window)
        return dense_mask(batch, mask_mod, batch["masked_Q"] if is_causal else None)
    match attention:
        case "sdpa":
            return dense_mask(batch, mask_mod)
        case "eager":
            return torch.where(dense_mask(batch, mask_mod), 0.0, torch.finfo(torch.float32).min)
        case "flex_attention":
            # rebuilt for every batch: it captures the batch's own records, not only its shape
            compiled = device.type == "cuda"
            return create_block_mask(mask_mod, rows, None, width, width, device=device.type, _compile=compiled)
        case _:
            raise UserError(
                f"attn_implementation {attention!r}: does not support a custom attention mask; expected sdpa, eager or "
                "flex_attention"
            )
