"""Augmented images are transformed as their random numbers say, independently of their batch."""

from __future__ import annotations

import pytest
import torch

from mint_ray.images import Frame
from mint_ray.teachers.config import Augmentation
from mint_ray.teachers.fusion.augmentation import NUM_DRAWS, ImagePreprocessor, augment


def test_rotations_and_flips_move_pixels_without_changing_them() -> None:
    image = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    config = Augmentation(min_crop_scale=1.0, color_jitter=0.0)
    expected = {
        tuple(torch.rot90(x, quarters, (2, 3)).flatten().tolist())
        for x in (image, image.flip(3))
        for quarters in range(4)
    }
    found = set()
    for flip in (0.2, 0.7):
        for turn in (0.1, 0.3, 0.6, 0.9):
            draws = torch.full((1, NUM_DRAWS), 0.5)
            draws[0, :2] = torch.tensor([flip, turn])
            augmented = augment(image, draws, config)
            nearest = min(expected, key=lambda x: float((torch.tensor(x) - augmented.flatten()).abs().max()))
            torch.testing.assert_close(augmented.flatten(), torch.tensor(nearest), atol=1e-5, rtol=1e-5)
            found.add(nearest)
    assert found == expected


def test_a_crop_stays_inside_the_image() -> None:
    ramp = torch.arange(64.0).div(63).expand(1, 3, 64, 64)
    config = Augmentation(horizontal_flip=False, rotate90=False, min_crop_scale=0.5, color_jitter=0.0)
    draws = torch.full((1, NUM_DRAWS), 0.5)
    draws[0, 2:5] = torch.tensor([0.0, 1.0, 0.5])  # the smallest crop, at the right edge
    row = augment(ramp, draws, config)[0, 0, 32]
    assert float(row[0]) == pytest.approx(0.5, abs=0.02)
    assert float(row[-1]) == pytest.approx(1.0, abs=0.02)


def test_color_jitter_keeps_the_mean_within_its_range() -> None:
    images = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4
    draws = torch.rand(64, NUM_DRAWS, generator=torch.Generator().manual_seed(1))
    config = Augmentation(horizontal_flip=False, rotate90=False, min_crop_scale=1.0, color_jitter=0.1)
    ratio = augment(images, draws, config).mean(dim=(1, 2, 3)) / images.mean(dim=(1, 2, 3))
    assert 0.9 <= float(ratio.min()) < 0.95
    assert 1.05 < float(ratio.max()) <= 1.1


def test_an_image_is_augmented_alike_in_any_batch() -> None:
    preprocessor = ImagePreprocessor(Frame(size=8), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    pixels = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    draws = torch.rand(3, NUM_DRAWS, generator=torch.Generator().manual_seed(1))
    together = preprocessor(pixels, draws, Augmentation())
    for i in range(3):
        single = preprocessor(pixels[i : i + 1], draws[i : i + 1], Augmentation())
        torch.testing.assert_close(single[0], together[i])
    assert not torch.allclose(together, preprocessor(pixels))
