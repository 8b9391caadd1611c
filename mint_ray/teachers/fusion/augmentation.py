"""Bring bytes of pixels into the form that an encoder was trained on, varied while it learns."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch.nn import functional

from mint_ray.images import Frame
from mint_ray.teachers.config import Augmentation

Tensor = torch.Tensor

DRAWS = 8
"""Numbers in [0, 1) that decide how one image is varied."""


@dataclasses.dataclass(frozen=True)
class Look:
    """The frame of an encoder's images, and the mean and deviation of each colour that they are scaled by."""

    frame: Frame
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def prepare(self, pixels: Tensor, draws: Tensor | None = None, how: Augmentation | None = None) -> Tensor:
        """(B, size, size, 3) bytes to (B, 3, size, size) scaled numbers, varied by `draws` (B, DRAWS) if there are."""
        images = pixels.permute(0, 3, 1, 2).float() / 255
        if draws is not None and how is not None:
            images = vary(images, draws.to(images.device), how)
        mean = images.new_tensor(self.mean)[:, None, None]
        deviation = images.new_tensor(self.deviation)[:, None, None]
        return ((images - mean) / deviation).contiguous(memory_format=torch.channels_last)


def vary(images: Tensor, draws: Tensor, how: Augmentation) -> Tensor:
    """Images (B, 3, H, H) in [0, 1], each turned, mirrored, cropped and tinted as its own `draws` (B, DRAWS) say."""
    flip, turn, scale, right, down, bright, contrast, colour = draws.unbind(dim=1)
    mirror = 1 - 2 * (flip < 0.5).float() if how.flip else torch.ones_like(flip)
    angle = torch.floor(turn * 4) * (math.pi / 2) if how.turn else torch.zeros_like(turn)
    side = how.crop + (1 - how.crop) * scale
    cos, sin = torch.round(torch.cos(angle)), torch.round(torch.sin(angle))
    # the window stays inside the image: its middle moves by at most what the crop leaves
    x, y = (1 - side) * (2 * right - 1), (1 - side) * (2 * down - 1)
    rows = [
        torch.stack([mirror * side * cos, -side * sin, x], dim=1),
        torch.stack([mirror * side * sin, side * cos, y], dim=1),
    ]
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    seen = functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    if how.colour:
        bright, contrast, colour = (
            (1 + how.colour * (2 * draw - 1))[:, None, None, None] for draw in (bright, contrast, colour)
        )
        middle = seen.mean(dim=(1, 2, 3), keepdim=True)
        seen = (seen - middle) * contrast + middle * bright
        grey = seen.mean(dim=1, keepdim=True)
        seen = ((seen - grey) * colour + grey).clamp(0, 1)
    return seen
