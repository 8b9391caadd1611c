"""The weights of a probe are at the optimum, for which PyTorch's gradient is zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mint_ray.teachers.calibration import Floats, Indices, negative_log_likelihood
from mint_ray.teachers.linear_probe import INVERSE_REGULARIZATIONS, apply_probe, choose_probe, fit_probe


def blobs(rows: int, spread: float, seed: int, labels: int = 3, width: int = 5) -> tuple[Floats, Indices]:
    """Return Gaussian clouds around unit vectors; the last label has most rows."""
    rng = np.random.default_rng(seed)
    label_N = np.minimum(rng.integers(0, labels + 2, rows), labels - 1)
    centers = np.eye(width)[:labels]
    return centers[label_N] + rng.normal(0, spread, (rows, width)), label_N


@pytest.mark.parametrize("labels", [2, 3])
@pytest.mark.parametrize("c", [0.1, 10.0])
def test_the_gradient_is_zero_at_the_weights(c: float, labels: int) -> None:
    features_ND, label_N = blobs(60, 0.5, 0, labels)
    weights = torch.tensor(fit_probe(features_ND, label_N, labels, c), requires_grad=True)
    rows = torch.tensor(np.hstack([features_ND, np.ones((60, 1))]))
    truth = torch.tensor(label_N)
    class_weight = 60 / (labels * torch.bincount(truth).double())
    loss = torch.nn.functional.cross_entropy(rows @ weights.T, truth, weight=class_weight, reduction="sum")
    objective = c * loss + 0.5 * (weights**2).sum()
    (gradient,) = torch.autograd.grad(objective, weights)
    assert gradient.abs().max() < 1e-3 * c
    for factor in (0.99, 1.01):
        moved = weights * factor
        worse = torch.nn.functional.cross_entropy(rows @ moved.T, truth, weight=class_weight, reduction="sum")
        assert c * worse + 0.5 * (moved**2).sum() > objective


def test_the_order_of_the_rows_does_not_matter() -> None:
    features_ND, label_N = blobs(40, 0.5, 1)
    weights_LD = fit_probe(features_ND, label_N, 3, 10.0)
    assert fit_probe(features_ND[::-1], label_N[::-1], 3, 10.0) == pytest.approx(weights_LD, abs=1e-3)


def test_a_label_without_rows_has_finite_weights_and_is_never_first() -> None:
    features_ND, label_N = blobs(40, 0.2, 2)
    weights_LD = fit_probe(features_ND, label_N, 4, 1e4)
    assert np.isfinite(weights_LD).all()
    assert set(apply_probe(weights_LD, features_ND).argmax(axis=1)) == {0, 1, 2}


def test_the_chosen_regularization_has_the_lowest_balanced_loss_of_all_candidates() -> None:
    (train_ND, train_N), (validation_MD, validation_M) = blobs(40, 0.5, 3), blobs(300, 0.5, 4)
    weights_LD, chosen = choose_probe(train_ND, train_N, validation_MD, validation_M, 3)

    def balanced_loss(weights: Floats) -> float:
        logits = apply_probe(weights, validation_MD)
        by_label = [(logits[validation_M == k], validation_M[validation_M == k]) for k in range(3)]
        return float(np.mean([negative_log_likelihood(*rows) for rows in by_label]))

    cold = {c: fit_probe(train_ND, train_N, 3, c) for c in INVERSE_REGULARIZATIONS}
    losses = {c: balanced_loss(weights) for c, weights in cold.items()}
    assert chosen == min(losses, key=lambda c: losses[c])
    assert balanced_loss(weights_LD) == pytest.approx(losses[chosen], rel=1e-3)
    # each candidate starts from the one before it, which does not change the optimum
    assert weights_LD == pytest.approx(cold[chosen], abs=1e-3)
    assert INVERSE_REGULARIZATIONS[0] < chosen < INVERSE_REGULARIZATIONS[-1]


def test_a_single_label_is_an_error() -> None:
    with pytest.raises(ValueError, match="num_labels must be two or more, got 1"):
        fit_probe(np.ones((2, 1)), np.zeros(2, dtype=np.int64), 1, 1.0)
