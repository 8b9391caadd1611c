"""Measure how well predictions name the truth and follow the teacher, with intervals over groups."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mint_ray.records import Prediction

METRICS = (
    "top_1_accuracy",
    "top_10_accuracy",
    "hallucination_free_accuracy",
    "coverage",
    "avoidance",
    "car",
    "readable",
)
"""Every metric that `measure` gives, in the order in which it gives them; all lie in [0, 1], larger is better."""

_NEED_TEACHER = ("coverage", "avoidance", "car")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A metric's value and the ends of its interval; `low <= value <= high`."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class LabelCount:
    """How often a label was the truth, and how often it was then named first or among the first ten."""

    count: int
    top_1: int
    top_10: int


@dataclasses.dataclass(frozen=True)
class Moved:
    """Records by whether the answer was right before and after alignment."""

    kept: int
    """Right before and after."""
    gained: int
    """Wrong before, right after."""
    lost: int
    """Right before, wrong after."""
    neither: int
    """Wrong before and after."""


def measure(
    predictions: Sequence[Prediction],
    *,
    truth: Mapping[str, str],
    teacher: Mapping[str, Sequence[str]],
    group: Mapping[str, str],
    top: int,
    bottom: int,
    car_weight: float = 1.0,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Every metric of one method on the records of `truth`, with a percentile bootstrap interval over groups.

    `truth` maps record_id to the true label_id, `teacher` to the teacher's label ids best first, `group` to the
    group_id. Predictions of records outside `truth` are ignored, so that a part of the records can be measured.

    * `top_k_accuracy`: the truth is among the first k names as given; repeated names use up places.
    * `hallucination_free_accuracy`: the answer was read, is not empty, and every name is a label.
    * `coverage`: share of the named labels in the teacher's first `top`.
    * `avoidance`: 1 - share of the named labels in the teacher's last `bottom`.
    * `car`: (1 + w) C A / (w C + A) of the mean coverage C and the mean avoidance A, w being `car_weight`
      (arXiv 2505.05736); 0 where both are 0.
    * `readable`: share of the answers that could be read (`reason` is None).

    In coverage and avoidance a label that is named twice counts once, and every name that is no label counts, as a name
    in neither end. An answer that names nothing, read or not, covers nothing and avoids nothing: both are 0. Records
    that the teacher did not rank are left out of these two means; where it ranked none, `coverage`, `avoidance` and
    `car` are left out of the result.

    The interval is widened to hold the value where the percentiles of a skewed `car`, or rounding, would miss it.

    Raises ValueError naming the record that has no prediction, two predictions, no group, or a ranking shorter than
    `top + bottom`, and for settings out of range.
    """
    _check_settings(top, bottom, car_weight, resamples, confidence)
    answers = _by_record(predictions, truth)
    # sorted records and groups: the same rows in another order give the same bits
    records = sorted(truth)
    without = next((record_id for record_id in records if record_id not in group), None)
    if without is not None:
        raise ValueError(f"record {without!r} has no group")
    rows_NM = np.array(
        [_score(answers[key], truth[key], teacher.get(key, ()), top, bottom) for key in records]
    )  # N records, M columns of `_score`
    names, group_N = np.unique(np.array([group[key] for key in records]), return_inverse=True)
    sums_GM = np.zeros((len(names), rows_NM.shape[1]))
    np.add.at(sums_GM, group_N, rows_NM)

    rng = np.random.default_rng(seed)
    groups = len(names)
    totals_RM = np.empty((resamples, rows_NM.shape[1]))
    for resample in range(resamples):
        totals_RM[resample] = np.bincount(rng.integers(groups, size=groups), minlength=groups) @ sums_GM

    values = _statistics(np.ones(groups) @ sums_GM, car_weight)
    draws = _statistics(totals_RM, car_weight)
    ranked = bool(rows_NM[:, -1].any())
    tail = (1 - confidence) / 2
    estimates = {}
    for name in METRICS:
        if name in _NEED_TEACHER and not ranked:
            continue
        value = float(values[name])
        # a resample may hold no record that the teacher ranked
        known = draws[name][~np.isnan(draws[name])]
        low, high = np.quantile(known, [tail, 1 - tail]) if len(known) else (value, value)
        estimates[name] = Estimate(value, min(float(low), value), max(float(high), value))
    return estimates


def per_label(predictions: Sequence[Prediction], truth: Mapping[str, str]) -> dict[str, LabelCount]:
    """For each true label_id its records and its hits, labels sorted by id.

    Raises ValueError naming the record that has no prediction or two.
    """
    answers = _by_record(predictions, truth)
    counts: dict[str, list[int]] = {label_id: [0, 0, 0] for label_id in sorted(set(truth.values()))}
    for record_id, label_id in truth.items():
        named = _named(answers[record_id])
        count = counts[label_id]
        count[0] += 1
        count[1] += label_id in named[:1]
        count[2] += label_id in named[:10]
    return {label_id: LabelCount(*count) for label_id, count in counts.items()}


def moved(
    before: Sequence[Prediction], after: Sequence[Prediction], truth: Mapping[str, str], first: int = 10
) -> Moved:
    """How many records alignment put right or wrong; right is the truth among the `first` names.

    Raises ValueError naming the record that has no prediction or two.
    """
    old, new = _by_record(before, truth), _by_record(after, truth)
    cells = [[0, 0], [0, 0]]
    for record_id, label_id in truth.items():
        was = label_id in _named(old[record_id])[:first]
        now = label_id in _named(new[record_id])[:first]
        cells[was][now] += 1
    return Moved(kept=cells[1][1], gained=cells[0][1], lost=cells[1][0], neither=cells[0][0])


def _named(prediction: Prediction) -> list[str]:
    return prediction.labels if prediction.reason is None else []


def _by_record(predictions: Iterable[Prediction], truth: Mapping[str, str]) -> dict[str, Prediction]:
    if not truth:
        raise ValueError("there are no records to measure")
    answers: dict[str, Prediction] = {}
    for prediction in predictions:
        if prediction.record_id not in truth:
            continue
        if prediction.record_id in answers:
            raise ValueError(f"record {prediction.record_id!r} has more than one prediction")
        answers[prediction.record_id] = prediction
    for record_id in truth:
        if record_id not in answers:
            raise ValueError(f"record {record_id!r} has no prediction")
    return answers


def _score(prediction: Prediction, label_id: str, ranking: Sequence[str], top: int, bottom: int) -> list[float]:
    """One record's part of each mean: readable, top 1, top 10, hallucination-free, coverage, avoidance, 1, ranked."""
    if ranking and len(ranking) < top + bottom:
        raise ValueError(
            f"record {prediction.record_id!r}: the teacher ranks {len(ranking)} labels, fewer than "
            f"top + bottom = {top + bottom}"
        )
    named = _named(prediction)
    read = prediction.reason is None
    real = {name for name in named if name}
    names = len(real) + sum(not name for name in named)
    covered = avoided = 0.0
    if ranking and names:
        covered = len(real.intersection(ranking[:top])) / names
        avoided = 1 - len(real.intersection(ranking[-bottom:])) / names
    return [
        read,
        label_id in named[:1],
        label_id in named[:10],
        bool(named) and all(named),
        covered,
        avoided,
        1.0,
        bool(ranking),
    ]


def _statistics(totals: NDArray[np.float64], car_weight: float) -> dict[str, NDArray[np.float64]]:
    """The metrics of (re)samples from their column totals, shape (..., 8) to (...)."""
    readable, top_1, top_10, clean, covered, avoided, records, ranked = np.moveaxis(totals, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        coverage, avoidance = covered / ranked, avoided / ranked
        below = car_weight * coverage + avoidance
        car = np.where(below == 0, 0.0, (1 + car_weight) * coverage * avoidance / below)
    return {
        "top_1_accuracy": top_1 / records,
        "top_10_accuracy": top_10 / records,
        "hallucination_free_accuracy": clean / records,
        "coverage": coverage,
        "avoidance": avoidance,
        "car": car,
        "readable": readable / records,
    }


def _check_settings(top: int, bottom: int, car_weight: float, resamples: int, confidence: float) -> None:
    if top < 1 or bottom < 1:
        raise ValueError(f"top and bottom must be positive, got {top} and {bottom}")
    if not (math.isfinite(car_weight) and car_weight >= 0):
        raise ValueError(f"car_weight must be a number of at least 0, got {car_weight}")
    if resamples < 1:
        raise ValueError(f"resamples must be positive, got {resamples}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
