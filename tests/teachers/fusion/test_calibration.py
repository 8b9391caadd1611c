from __future__ import annotations

import numpy as np
import pytest

from mint_ray.teachers.fusion import calibration


def noisy(sure: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose truths are drawn from the softmax of them, then multiplied by `sure`."""
    random = np.random.default_rng(0)
    honest = random.normal(size=(4000, 3)) * 2
    chance = np.exp(honest) / np.exp(honest).sum(axis=1, keepdims=True)
    truth = (random.random((4000, 1)) > chance.cumsum(axis=1)).sum(axis=1)
    return honest * sure, truth


def test_measures_are_those_of_a_hand_count() -> None:
    # three of the first label, two of them right; one of the second, wrong; a third label that none is of
    logits = np.log([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.4, 0.2, 0.4]])
    truth = np.array([0, 0, 0, 1])
    assert calibration.accuracy(logits, truth) == 0.5
    assert calibration.balanced_accuracy(logits, truth) == pytest.approx((2 / 3 + 0) / 2)
    expected = -(np.log(0.7) + np.log(0.5) + np.log(0.1) + np.log(0.2)) / 4
    assert calibration.negative_log_likelihood(logits + 5.0, truth) == pytest.approx(expected)


def test_the_calibration_error_is_the_gap_between_sureness_and_accuracy() -> None:
    # four answers that are 80 % sure, three of them right: one bin, |0.8 - 0.75|
    logits = np.log([[0.8, 0.2]] * 4)
    assert calibration.calibration_error(logits, np.array([0, 0, 0, 1])) == pytest.approx(0.05)


@pytest.mark.parametrize("sure", [0.3, 4.0])
def test_the_temperature_undoes_what_made_logits_too_sure_or_not_sure_enough(sure: float) -> None:
    logits, truth = noisy(sure)
    temperature = calibration.best_temperature(logits, truth)
    assert temperature == pytest.approx(sure, rel=0.1)
    for measure in (calibration.negative_log_likelihood, calibration.calibration_error):
        assert measure(logits / temperature, truth) < measure(logits, truth)
