"""The fusion head ignores the values of missing modalities, and starts without unimodal logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mint_ray.teachers.config import Fusion
from mint_ray.teachers.fusion.network import MIN_STD, FusionHead

SIZES = {"image": 6, "fields": 3}


def make_head(fusion: str, **settings: Any) -> FusionHead:
    torch.manual_seed(0)
    config = Fusion(phenotypes=True, fusion=fusion, hidden_size=8, **settings)  # type: ignore[arg-type]
    return FusionHead(config, SIZES, 4)


def make_batch(rows: int = 5) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    features = {name: torch.randn(rows, size, generator=generator) for name, size in SIZES.items()}
    return features, {name: torch.ones(rows, dtype=torch.bool) for name in SIZES}


@pytest.mark.parametrize("fusion", ["concat", "gated", "attention"])
def test_values_of_a_missing_modality_do_not_matter(fusion: str) -> None:
    head, (features, present) = make_head(fusion), make_batch()
    complete = head(features, present, None)
    present["image"][0] = False
    expected = head(features, present, None)
    features["image"][0] = float("nan")
    found = head(features, present, None)
    assert found.shape == (5, 4)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[1:], complete[1:])
    assert not torch.allclose(found[0], complete[0])


def test_features_are_normalized_and_constant_ones_are_not_blown_up() -> None:
    head, (features, present) = make_head("concat"), make_batch()
    expected = head(features, present, None)
    head.set_normalization("image", torch.full((6,), 2.0), torch.full((6,), 3.0))
    shifted = features | {"image": features["image"] * 3 + 2}
    torch.testing.assert_close(head(shifted, present, None), expected, atol=1e-5, rtol=1e-5)
    head.set_normalization("image", torch.zeros(6), torch.zeros(6))
    assert head.get_buffer("std_image").tolist() == pytest.approx([MIN_STD] * 6)


def test_each_modality_has_a_linear_classifier_that_starts_at_zero() -> None:
    head, (features, present) = make_head("concat"), make_batch()
    before = head(features, present, None)
    weights = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        head.unimodal_classifiers["fields"].weight.copy_(weights)
    torch.testing.assert_close(
        head(features, present, None) - before, features["fields"] @ weights.T, atol=1e-5, rtol=1e-5
    )


def test_dropout_multiplies_the_fused_features() -> None:
    head, (features, present) = make_head("gated"), make_batch()
    dropped = head(features, present, torch.zeros(5, 8))
    torch.testing.assert_close(dropped, head.classifier.bias.expand(5, 4))
