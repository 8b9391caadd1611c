"""Say which tokens of a shared row may see which, in the form that the model's attention takes."""

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
from mint_ray.layouts.images import blocks, both_ways

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

PADDING, PREFIX = -1, 0
"""Segment of a token; completion i of its record is segment i + 1. Padding is of record -1."""

SPLIT = "mint_ray_split_sdpa"
"""Name under which transformers knows `split_attention`."""

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Whether, in a row and head of the batch, the query at one column may see the key at another."""


def visibility(batch: Batch, window: int | None = None, images: Tensor | None = None) -> Rule:
    """Same record AND causal AND (key in the prefix OR same segment), and less than `window` positions away.

    Reads `records`, `segments` and `position_ids` (rows, W). Padding sees itself, so no query is left without a key,
    which would be NaN. Tokens of one of the `images` (rows, W), which are numbered as by `layouts.images.blocks`, see
    each other both ways.
    """
    records, segments, positions = batch["records"], batch["segments"], batch["position_ids"]

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        segment = segments[row, key]
        seen = query >= key
        if images is not None:
            seen = seen | ((images[row, query] == images[row, key]) & (images[row, key] >= 0))
        seen = seen & (records[row, query] == records[row, key])
        seen = seen & ((segment == PREFIX) | (segment == segments[row, query]))
        if window is not None:
            seen = seen & (positions[row, query] - positions[row, key] < window)
        return seen

    return rule


def attention_mask(model: nn.Module, batch: Batch) -> Any:
    """`visibility` for `attention_mask` of transformers: a mask, or one for each kind of layer the model has.

    Sliding windows are counted in positions, which start again behind the prefix, so that they reach as far as in
    rows of one completion. Raises UserError for attention that takes no such mask.
    """
    config, attention = _text_config(model), attention_of(model)
    window = getattr(config, "sliding_window", None)
    images = blocks(batch["is_image"]) if "is_image" in batch and both_ways(model) else None
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise UserError(f"layer_types {', '.join(sorted(unknown))!r}: takes no mask of its own")
    if "sliding_attention" in kinds:
        windows = {"full_attention": None, "sliding_attention": window}
        return {kind: _mask(attention, batch, windows[kind], images) for kind in sorted(kinds)}
    # models of one kind of layer, such as Mistral, slide in all of them or in none
    return _mask(attention, batch, None if kinds else window, images)


def dense(batch: Batch, rule: Rule, queries_Q: Tensor | None = None) -> Tensor:
    """A rule as a boolean tensor (rows, 1, Q, W); of every column unless `queries_Q` names some."""
    rows, width = batch["input_ids"].shape
    device = batch["input_ids"].device
    row, key = torch.arange(rows, device=device), torch.arange(width, device=device)
    query = key if queries_Q is None else queries_Q
    return rule(row[:, None, None, None], row[:1], query[:, None], key)


def split_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa for a mask that covers the last queries only; the columns before them are plainly causal.

    A kernel that is told "causal" skips what it hides, half of the work, and one that is given a mask does not.
    Tensors are (rows, heads, W, head size), the mask (rows, 1, Q, W) with Q <= W.
    """
    first = 0 if attention_mask is None else query.shape[2] - attention_mask.shape[2]
    if first == 0:
        whole: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return whole
    options["is_causal"] = True
    prefix, _ = sdpa_attention_forward(
        module, query[:, :, :first], key[:, :, :first], value[:, :, :first], None, **options
    )
    if first == query.shape[2]:
        return prefix, None
    rest, _ = sdpa_attention_forward(module, query[:, :, first:], key, value, attention_mask, **options)
    return torch.cat([prefix, rest], dim=1), None


def attention_of(model: nn.Module) -> str | None:
    """Name of the model's attention, as in `attn_implementation`."""
    return getattr(_text_config(model), "_attn_implementation", None)


def set_attention(model: nn.Module, attention: str | None) -> None:
    """Let the layers of `model` that read compute attention by another implementation from now on, or by `SPLIT`.

    What sees images keeps its own. Raises UserError if `model` does not say which layers those are.
    """
    if attention == attention_of(model):
        return
    AttentionInterface.register(SPLIT, split_attention)
    AttentionMaskInterface.register(SPLIT, sdpa_mask)
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
    rule = visibility(batch, window, images)
    rows, width = batch["input_ids"].shape
    device = batch["input_ids"].device
    if attention == SPLIT:
        is_causal = images is None and (window is None or width - len(batch["masked_Q"]) <= window)
        return dense(batch, rule, batch["masked_Q"] if is_causal else None)
    match attention:
        case "sdpa":
            return dense(batch, rule)
        case "eager":
            return torch.where(dense(batch, rule), 0.0, torch.finfo(torch.float32).min)
        case "flex_attention":
            # made anew for every batch: it knows the batch's own records, not only its shape
            compiled = device.type == "cuda"
            return create_block_mask(rule, rows, None, width, width, device=device.type, _compile=compiled)
        case _:
            raise UserError(
                f"attn_implementation {attention!r}: takes no mask of its own; expected sdpa, eager or flex_attention"
            )
