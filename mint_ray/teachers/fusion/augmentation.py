"""Preprocessing of decoded images for an encoder, with random augmentation during training."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch.nn import functional

from mint_ray.images import Frame
from mint_ray.teachers.config import Augmentation

Tensor = torch.Tensor

NUM_DRAWS = 8
"""Uniform random numbers in [0, 1) that determine the augmentation of one image."""


@dataclasses.dataclass(frozen=True)
class ImagePreprocessor:
    """Form of an encoder's images, and mean and standard deviation of each color channel."""

    frame: Frame
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Tensor, draws: Tensor | None = None, augmentation: Augmentation | None = None) -> Tensor:
        """Return (B, size, size, 3) bytes as (B, 3, size, size) normalized numbers, augmented if draws are given.

        `draws` has shape (B, NUM_DRAWS).
        """
        images = pixels.permute(0, 3, 1, 2).float() / 255
        if draws is not None and augmentation is not None:
            images = augment(images, draws.to(images.device), augmentation)
        mean = images.new_tensor(self.mean)[:, None, None]
        std = images.new_tensor(self.std)[:, None, None]
        return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, draws: Tensor, config: Augmentation) -> Tensor:
    """Return images (B, 3, H, H) in [0, 1], each transformed as its own `draws` (B, NUM_DRAWS) determine.

    Not torchvision's transforms: every process computes its share of the rows, so the random numbers of an image must
    not depend on its batch.
    """
    flip, turn, scale, right, down, brightness, contrast, saturation = draws.unbind(dim=1)
    mirror = 1 - 2 * (flip < 0.5).float() if config.horizontal_flip else torch.ones_like(flip)
    angle = torch.floor(turn * 4) * (math.pi / 2) if config.rotate90 else torch.zeros_like(turn)
    side = config.min_crop_scale + (1 - config.min_crop_scale) * scale
    cos, sin = torch.round(torch.cos(angle)), torch.round(torch.sin(angle))
    # the crop stays inside the image: its center moves by at most what the crop leaves out
    x, y = (1 - side) * (2 * right - 1), (1 - side) * (2 * down - 1)
    rows = [
        torch.stack([mirror * side * cos, -side * sin, x], dim=1),
        torch.stack([mirror * side * sin, side * cos, y], dim=1),
    ]
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    augmented = functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    if config.color_jitter:
        brightness, contrast, saturation = (
            (1 + config.color_jitter * (2 * draw - 1))[:, None, None, None]
            for draw in (brightness, contrast, saturation)
        )
        mean = augmented.mean(dim=(1, 2, 3), keepdim=True)
        augmented = (augmented - mean) * contrast + mean * brightness
        grey = augmented.mean(dim=1, keepdim=True)
        augmented = ((augmented - grey) * saturation + grey).clamp(0, 1)
    return augmented
