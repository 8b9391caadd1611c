"""Lay images beside the tokens of a batch, in the form in which each family of models takes them.

Models with image tokens in the prompt (LLaVA, Idefics3, Qwen2-VL, Gemma 3) fill them row by row from left to right, so
images go in that order. Qwen gives an image's tokens positions on three axes; in Gemma 3 they see each other both ways.
Models that look at images by cross-attention (Mllama) take an image by the row, and a mask of who may look at it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mint_ray.config.loader import UserError
from mint_ray.layouts import Batch, Example

IMAGE = "image."
"""What the names of those tensors begin with that go to the model as they are."""


def lay_images(input_ids: Tensor, examples: Sequence[Example]) -> Batch:
    """The images of `examples`, which stand in `input_ids` (rows, W) in this order, row by row from left to right.

    `is_image` (rows, W) says which tokens stand for one. Nothing if no example has an image. Raises UserError naming a
    record without an image where others have one.
    """
    images = [example.image for example in examples if example.image is not None]
    if not images:
        return {}
    if blind := [example.record_id for example in examples if example.image is None]:
        raise UserError(f"record {blind[0]!r}: has no image, as other records of its batch have")
    # Idefics3 counts an image's tiles on the second axis, and knows of no other use for the first
    axis = 1 if "pixel_attention_mask" in images[0].inputs else 0
    tensors = {IMAGE + name: torch.cat([image.inputs[name] for image in images], axis) for name in images[0].inputs}
    is_image = (input_ids == images[0].token_id).long()
    if is_crossed(examples[0]):
        # a token looks at the image that stands ahead of it, with as many tiles as that has
        tiles = tensors[f"{IMAGE}aspect_ratio_mask"][:, None]
        tensors[f"{IMAGE}cross_attention_mask"] = (is_image.cumsum(1) > 0)[:, :, None, None].long() * tiles
    return {"is_image": is_image, **tensors}


def is_crossed(example: Example) -> bool:
    """Whether the example's image is looked at by cross-attention."""
    return example.image is not None and "aspect_ratio_ids" in example.image.inputs


def image_inputs(batch: Batch) -> dict[str, Tensor]:
    """What of a batch's images the model's forward takes."""
    return {name.removeprefix(IMAGE): tensor for name, tensor in batch.items() if name.startswith(IMAGE)}


def token_kinds(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Which tokens stand for an image, for models that make positions or masks of their own from that."""
    if "is_image" not in batch:
        return {}
    takes = inspect.signature(inner_model(model).forward).parameters
    return {name: batch["is_image"] for name in ("mm_token_type_ids", "token_type_ids") if name in takes}


def both_ways(model: nn.Module) -> bool:
    """Whether the tokens of an image see each other both ways, as Gemma 3 has it."""
    return "token_type_ids" in inspect.signature(inner_model(model).forward).parameters


def blocks(is_image: Tensor) -> Tensor:
    """The number, within its row, of the image that each token stands for; -1 of a token of text."""
    starts = is_image.bool() & ~pad(is_image, (1, 0))[:, :-1].bool()
    return torch.where(is_image.bool(), starts.long().cumsum(1) - 1, -1)


def positions(model: nn.Module, batch: Batch) -> Tensor:
    """`position_ids` (rows, W) of the shared-prefix layout; (axes, rows, W) for a model with several axes.

    On those a prefix has the positions that the model itself gives it, and completions go on behind the last of them.
    """
    rope_index = getattr(getattr(inner_model(model), "model", None), "get_rope_index", None)
    plain = batch["position_ids"]
    if rope_index is None or "is_image" not in batch:
        return plain
    places = batch["prefixes_B4"].tolist()
    width = max(length for *_, length in places)

    def of_prefixes(values: Tensor) -> Tensor:
        return torch.stack(
            [pad(values[row, start : start + length], (0, width - length)) for _, row, start, length in places]
        )

    own, _ = rope_index(
        input_ids=of_prefixes(batch["input_ids"]),
        mm_token_type_ids=of_prefixes(batch["is_image"]),
        image_grid_thw=batch[f"{IMAGE}image_grid_thw"],
        attention_mask=of_prefixes(torch.ones_like(plain)),
    )
    spread = plain.expand(len(own), *plain.shape).clone()
    for index, (record, row, start, length) in enumerate(places):
        prefix = own[:, index, :length]
        spread[:, batch["records"] == record] += prefix.max() + 1 - length
        spread[:, row, start : start + length] = prefix
    return spread


def inner_model(model: nn.Module) -> Any:
    """The model of transformers inside what DDP, DeepSpeed and PEFT wrap around it."""
    while isinstance(wrapped := getattr(model, "module", None), nn.Module):
        model = wrapped
    base = getattr(model, "get_base_model", None)
    return base() if base is not None else model
