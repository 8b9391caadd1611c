"""The images of a batch, in the form that each family of vision-language models expects.

Models with image tokens in the prompt (LLaVA, Idefics3, Qwen2-VL, Gemma 3) fill them row by row from left to right, so
images are concatenated in that order. Qwen2-VL gives image tokens positions on three axes; in Gemma 3 the tokens of an
image attend to each other in both directions. Models with cross-attention to images (Mllama) take one image per row and
a mask of the tokens that may attend to it.
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
"""Prefix of the batch's tensors that are passed to the model unchanged."""


def collate_images(input_ids: Tensor, examples: Sequence[Example]) -> Batch:
    """Return the images of `examples`, and `is_image` (rows, W), which marks the image tokens.

    `examples` are in the order in which they stand in `input_ids` (rows, W), row by row from left to right. The batch
    is empty if no example has an image. Raises UserError naming a record without an image if others have one.
    """
    images = [example.image for example in examples if example.image is not None]
    if not images:
        return {}
    if without := [example.record_id for example in examples if example.image is None]:
        raise UserError(f"record {without[0]!r}: has no image, but other records of its batch have one")
    # Idefics3 counts tiles on the second axis and allows only one entry on the first
    axis = 1 if "pixel_attention_mask" in images[0].tensors else 0
    tensors = {IMAGE + name: torch.cat([image.tensors[name] for image in images], axis) for name in images[0].tensors}
    is_image = (input_ids == images[0].token_id).long()
    if uses_cross_attention(examples[0]):
        # a token attends to the image ahead of it, with as many tiles as that image has
        tiles = tensors[f"{IMAGE}aspect_ratio_mask"][:, None]
        tensors[f"{IMAGE}cross_attention_mask"] = (is_image.cumsum(1) > 0)[:, :, None, None].long() * tiles
    return {"is_image": is_image, **tensors}


def uses_cross_attention(example: Example) -> bool:
    """Return True if the model reads the example's image by cross-attention."""
    return example.image is not None and "aspect_ratio_ids" in example.image.tensors


def image_kwargs(batch: Batch) -> dict[str, Tensor]:
    """Return the batch's image tensors as keyword arguments of the model's forward."""
    return {name.removeprefix(IMAGE): tensor for name, tensor in batch.items() if name.startswith(IMAGE)}


def token_type_kwargs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the mask of image tokens under the argument name of models that derive positions or masks from it."""
    if "is_image" not in batch:
        return {}
    parameters = inspect.signature(unwrap_model(model).forward).parameters
    return {name: batch["is_image"] for name in ("mm_token_type_ids", "token_type_ids") if name in parameters}


def attends_within_images(model: nn.Module) -> bool:
    """Return True if the tokens of an image attend to each other in both directions, as in Gemma 3."""
    return "token_type_ids" in inspect.signature(unwrap_model(model).forward).parameters


def image_numbers(is_image: Tensor) -> Tensor:
    """Return for each token the number of its image within the row; -1 for text tokens. Shape (rows, W)."""
    starts = is_image.bool() & ~pad(is_image, (1, 0))[:, :-1].bool()
    return torch.where(is_image.bool(), starts.long().cumsum(1) - 1, -1)


def model_position_ids(model: nn.Module, batch: Batch) -> Tensor:
    """Return `position_ids` (rows, W) of the shared-prefix layout; (axes, rows, W) for a model with several axes.

    With several axes a prefix has the positions that the model itself computes for it, and completions continue after
    the largest of them.
    """
    get_rope_index = getattr(getattr(unwrap_model(model), "model", None), "get_rope_index", None)
    plain = batch["position_ids"]
    if get_rope_index is None or "is_image" not in batch:
        return plain
    prefixes = batch["prefixes_B4"].tolist()
    width = max(length for *_, length in prefixes)

    def prefix_rows(values: Tensor) -> Tensor:
        return torch.stack(
            [pad(values[row, start : start + length], (0, width - length)) for _, row, start, length in prefixes]
        )

    computed, _ = get_rope_index(
        input_ids=prefix_rows(batch["input_ids"]),
        mm_token_type_ids=prefix_rows(batch["is_image"]),
        image_grid_thw=batch[f"{IMAGE}image_grid_thw"],
        attention_mask=prefix_rows(torch.ones_like(plain)),
    )
    position_ids = plain.expand(len(computed), *plain.shape).clone()
    for index, (record, row, start, length) in enumerate(prefixes):
        prefix = computed[:, index, :length]
        position_ids[:, batch["records"] == record] += prefix.max() + 1 - length
        position_ids[:, row, start : start + length] = prefix
    return position_ids


def unwrap_model(model: nn.Module) -> Any:
    """Return the transformers model inside the wrappers of DDP, DeepSpeed and PEFT."""
    while isinstance(wrapped := getattr(model, "module", None), nn.Module):
        model = wrapped
    base = getattr(model, "get_base_model", None)
    return base() if base is not None else model
