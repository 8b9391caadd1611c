"""A probe is at the optimum that torch's gradients know of, and a temperature at the best of a fine grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mint_ray.teachers.linear_probe import (
    STRENGTHS,
    Array,
    Places,
    apply_probe,
    choose_probe,
    fit_probe,
    fit_temperature,
    likelihood_loss,
)


def blobs(rows: int, spread: float, seed: int, labels: int = 3, width: int = 5) -> tuple[Array, Places]:
    """Clouds round the corners of a cube; the first label has most rows."""
    rng = np.random.default_rng(seed)
    label_N = np.minimum(rng.integers(0, labels + 2, rows), labels - 1)
    centres = np.eye(width)[:labels]
    return centres[label_N] + rng.normal(0, spread, (rows, width)), label_N


@pytest.mark.parametrize("c", [0.1, 10.0])
def test_weights_are_where_the_gradient_is_zero(c: float) -> None:
    features_ND, label_N = blobs(60, 0.5, 0)
    found = torch.tensor(fit_probe(features_ND, label_N, 3, c), requires_grad=True)
    rows = torch.tensor(np.hstack([features_ND, np.ones((60, 1))]))
    truth = torch.tensor(label_N)
    counts = torch.bincount(truth).double()
    loss = torch.nn.functional.cross_entropy(rows @ found.T, truth, weight=60 / (3 * counts), reduction="sum")
    objective = c * loss + 0.5 * (found**2).sum()
    (slope,) = torch.autograd.grad(objective, found)
    assert slope.abs().max() < 1e-3 * c
    for other in (0.99, 1.01):
        moved = found * other
        worse = torch.nn.functional.cross_entropy(rows @ moved.T, truth, weight=60 / (3 * counts), reduction="sum")
        assert c * worse + 0.5 * (moved**2).sum() > objective


def test_the_order_of_the_rows_and_the_start_change_nothing() -> None:
    features_ND, label_N = blobs(40, 0.5, 1)
    one = fit_probe(features_ND, label_N, 3, 10.0)
    other = fit_probe(features_ND[::-1], label_N[::-1], 3, 10.0, start_LD=np.ones_like(one))
    assert other == pytest.approx(one, abs=1e-3)


def test_a_label_without_rows_has_finite_weights_and_is_never_first() -> None:
    features_ND, label_N = blobs(40, 0.2, 2)
    weights_LD = fit_probe(features_ND, label_N, 4, 1e4)
    assert np.isfinite(weights_LD).all()
    assert set(apply_probe(weights_LD, features_ND).argmax(axis=1)) == {0, 1, 2}


def test_the_strength_chosen_is_the_best_of_those_tried() -> None:
    (train_ND, train_N), (held_MD, held_M) = blobs(40, 0.5, 3), blobs(300, 0.5, 4)
    weights_LD, c = choose_probe(train_ND, train_N, held_MD, held_M, 3)

    def balanced_loss(weights: Array) -> float:
        logits = apply_probe(weights, held_MD)
        return float(np.mean([likelihood_loss(logits[held_M == k], held_M[held_M == k]) for k in range(3)]))

    tried = {strength: balanced_loss(fit_probe(train_ND, train_N, 3, strength)) for strength in STRENGTHS}
    assert c == min(tried, key=lambda strength: tried[strength])
    assert balanced_loss(weights_LD) == pytest.approx(tried[c], rel=1e-3)
    assert STRENGTHS[0] < c < STRENGTHS[-1]


def test_a_temperature_is_the_best_of_a_fine_grid_and_undoes_one_that_was_put_in() -> None:
    rng = np.random.default_rng(5)
    logits_NL = rng.normal(0, 2, (2_000, 4))
    chances = np.exp(logits_NL) / np.exp(logits_NL).sum(axis=1, keepdims=True)
    label_N = np.array([rng.choice(4, p=p) for p in chances])
    found = fit_temperature(logits_NL * 3.0, label_N)
    assert found == pytest.approx(3.0, rel=0.15)
    grid = np.exp(np.linspace(0.5, 1.5, 1_001))
    best = min(grid, key=lambda t: likelihood_loss(logits_NL * 3.0 / t, label_N))
    assert found == pytest.approx(best, rel=1e-3)


def test_the_temperature_of_a_teacher_that_is_always_right_stays_within_bounds() -> None:
    logits_NL = np.eye(3)[[0, 1, 2]] * 2.0
    assert 0.04 < fit_temperature(logits_NL, np.array([0, 1, 2])) < 1.0
