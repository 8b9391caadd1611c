"""Metrics match counts by hand, and a fitted temperature is the best of a fine grid."""

from __future__ import annotations

import numpy as np
import pytest

from mint_ray.teachers import calibration


def sample(factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Return logits whose labels are drawn from their softmax, then multiplied by `factor`, and the labels."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 3)) * 2
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (rng.random((4000, 1)) > probability.cumsum(axis=1)).sum(axis=1)
    return logits * factor, labels


def test_metrics_match_a_count_by_hand() -> None:
    # three of the first label, two of them right; one of the second, wrong; none of the third
    logits = np.log([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.4, 0.2, 0.4]])
    labels = np.array([0, 0, 0, 1])
    assert calibration.accuracy(logits, labels) == 0.5
    assert calibration.balanced_accuracy(logits, labels) == pytest.approx((2 / 3 + 0) / 2)
    expected = -(np.log(0.7) + np.log(0.5) + np.log(0.1) + np.log(0.2)) / 4
    assert calibration.negative_log_likelihood(logits + 5.0, labels) == pytest.approx(expected)
    weighted = -(3 * np.log(0.7) + np.log(0.2)) / 4
    weights = np.array([3.0, 0, 0, 1])
    assert calibration.negative_log_likelihood(logits, labels, weights) == pytest.approx(weighted)


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    # four answers of confidence 0.8, three of them right: one bin, |0.8 - 0.75|
    logits = np.log([[0.8, 0.2]] * 4)
    assert calibration.expected_calibration_error(logits, np.array([0, 0, 0, 1])) == pytest.approx(0.05)


@pytest.mark.parametrize("factor", [0.3, 4.0])
def test_a_temperature_corrects_logits_that_are_too_large_or_too_small(factor: float) -> None:
    logits, labels = sample(factor)
    temperature = calibration.fit_temperature(logits, labels)
    assert temperature == pytest.approx(factor, rel=0.1)
    for measure in (calibration.negative_log_likelihood, calibration.expected_calibration_error):
        assert measure(logits / temperature, labels) < measure(logits, labels)


def test_a_temperature_is_the_best_of_a_fine_grid() -> None:
    rng = np.random.default_rng(5)
    logits_NL = rng.normal(0, 2, (2_000, 4))
    probability_NL = np.exp(logits_NL) / np.exp(logits_NL).sum(axis=1, keepdims=True)
    label_N = np.array([rng.choice(4, p=p) for p in probability_NL])
    temperature = calibration.fit_temperature(logits_NL * 3.0, label_N)
    assert temperature == pytest.approx(3.0, rel=0.15)
    grid = np.exp(np.linspace(0.5, 1.5, 1_001))
    best = min(grid, key=lambda t: calibration.negative_log_likelihood(logits_NL * 3.0 / t, label_N))
    assert temperature == pytest.approx(best, rel=1e-3)


def test_the_temperature_of_a_teacher_that_is_always_right_stays_within_bounds() -> None:
    logits_NL = np.eye(3)[[0, 1, 2]] * 2.0
    assert 0.04 < calibration.fit_temperature(logits_NL, np.array([0, 1, 2])) < 1.0


def test_the_temperature_is_one_if_no_other_is_better() -> None:
    assert calibration.fit_temperature(np.zeros((2, 3)), np.array([0, 1])) == 1.0
