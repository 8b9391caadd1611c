"""Measure how well predictions name the truth and follow the teacher, with intervals over groups."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from mint_ray.records import Prediction

METRICS = (
    "top_1_accuracy",
    "top_10_accuracy",
    "mean_reciprocal_rank",
    "macro_top_1_accuracy",
    "hallucination_free_accuracy",
    "hallucination_rate",
    "coverage",
    "avoidance",
    "car",
    "readable",
    "expected_calibration_error",
    "brier_score",
)
"""Every metric that `measure` gives, in its order; all lie in [0, 1], the Brier score in [0, 2]."""

LOWER_IS_BETTER = ("hallucination_rate", "expected_calibration_error", "brier_score")
"""The metrics of which less is better."""

BINS = 10
"""Bins of confidence, of equal width, that the expected calibration error is summed over."""

_NEED_TEACHER = ("coverage", "avoidance", "car")
_NEED_SCORES = ("expected_calibration_error", "brier_score")
_AT_ONCE = 100
"""Resamples worked out together: memory grows with them, and with groups and labels."""


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
    * `mean_reciprocal_rank`: one over the place of the truth, 0 where it is not named.
    * `macro_top_1_accuracy`: the mean over the true labels of each label's own top-1 accuracy.
    * `hallucination_free_accuracy`: the answer was read, is not empty, and every name is a label.
    * `hallucination_rate`: share of all named items that are no label; an answer that names nothing, read or not,
      counts as one such item.
    * `coverage`: share of the named labels in the teacher's first `top`.
    * `avoidance`: 1 - share of the named labels in the teacher's last `bottom`.
    * `car`: (1 + w) C A / (w C + A) of the mean coverage C and the mean avoidance A, w being `car_weight`
      (arXiv 2505.05736); 0 where both are 0.
    * `readable`: share of the answers that could be read (`reason` is None).
    * `expected_calibration_error`: of the probability given to the first label, over ten bins of equal width
      (arXiv 1706.04599); only for answers with `scores`.
    * `brier_score`: sum over labels of (probability - 1 for the truth, else 0) squared; a label that is not named has
      probability 0, an answer without scores among others with them has none anywhere. From 0 to 2.

    In coverage and avoidance a label that is named twice counts once, and every name that is no label counts, as a name
    in neither end. An answer that names nothing, read or not, covers nothing and avoids nothing: both are 0. Records
    that the teacher did not rank are left out of these two means; where it ranked none, `coverage`, `avoidance` and
    `car` are left out of the result.

    An answer with `scores` may rank every label. It counts as a list of its first `top`, as long as anyone's, in all
    but the reciprocal rank and the two of calibration.

    The interval is widened to hold the value where the percentiles of a skewed `car`, or rounding, would miss it.

    Raises ValueError naming the record that has no prediction, two predictions, no group, or a ranking shorter than
    `top + bottom`, and for settings out of range.
    """
    return measure_runs(
        [predictions],
        truth=truth,
        teacher=teacher,
        group=group,
        top=top,
        bottom=bottom,
        car_weight=car_weight,
        resamples=resamples,
        confidence=confidence,
        seed=seed,
    )


def measure_runs(
    runs: Sequence[Sequence[Prediction]],
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
    """`measure` of a method that was trained several times, once with each seed: the mean over its runs.

    The interval carries both variations, by a bootstrap on two levels: each resample draws groups with replacement, the
    same for all runs, and then runs with replacement. Few runs make it a little too narrow, for the runs that were
    drawn vary less than the runs that could have been.
    """
    _check_settings(top, bottom, car_weight, resamples, confidence)
    if not runs:
        raise ValueError("there are no runs to measure")
    # sorted records and groups: the same rows in another order give the same bits
    records = sorted(truth)
    group_N, groups = index_groups(records, group)
    answers = [_by_record(predictions, truth) for predictions in runs]
    rows_SNM = np.array(
        [[_score(found[key], truth[key], teacher.get(key, ()), top, bottom) for key in records] for found in answers]
    )  # S runs, N records, M columns of `_score`
    sums_SGM = np.zeros((len(runs), groups, rows_SNM.shape[2]))
    for sums_GM, rows_NM in zip(sums_SGM, rows_SNM, strict=True):
        np.add.at(sums_GM, group_N, rows_NM)
    labels, label_N = np.unique(np.array([truth[key] for key in records]), return_inverse=True)
    places, shape = (group_N, label_N), (groups, len(labels))
    counts_GL = sparse.coo_array((np.ones(len(records)), places), shape=shape).tocsr()
    hits_SGL = [sparse.coo_array((rows_NM[:, _TOP_1], places), shape=shape).tocsr() for rows_NM in rows_SNM]

    def statistics(weights_RG: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        found = _statistics(weights_RG @ sums_SGM, car_weight)
        counts_LR = counts_GL.T @ weights_RG.T
        with np.errstate(invalid="ignore", divide="ignore"):
            # labels that a resample does not hold are left out of its mean
            found["macro_top_1_accuracy"] = np.array(
                [np.nanmean((hits_GL.T @ weights_RG.T) / counts_LR, axis=0) for hits_GL in hits_SGL]
            )
        return found  # each of shape (S, R)

    values = {name: runs_S1[:, 0] for name, runs_S1 in statistics(np.ones((1, groups))).items()}
    chunks = [statistics(weights_RG) for weights_RG in draw_groups(groups, resamples, seed)]
    picks_RS = draw_runs(len(runs), resamples, seed)
    tail = (1 - confidence) / 2
    ranked, scored = bool(rows_SNM[..., _RANKED].any()), bool(rows_SNM[..., _SCORED].any())
    estimates = {}
    for name in METRICS:
        if (name in _NEED_TEACHER and not ranked) or (name in _NEED_SCORES and not scored):
            continue
        value = float(values[name].mean())
        draws_RS = np.concatenate([chunk[name] for chunk in chunks], axis=1).T
        draws_R = np.take_along_axis(draws_RS, picks_RS, axis=1).mean(axis=1)
        # a resample may hold no record that the teacher ranked
        known = draws_R[~np.isnan(draws_R)]
        low, high = np.quantile(known, [tail, 1 - tail]) if len(known) else (value, value)
        estimates[name] = Estimate(value, min(float(low), value), max(float(high), value))
    return estimates


def index_groups(records: Sequence[str], group: Mapping[str, str]) -> tuple[NDArray[np.intp], int]:
    """For each record the number of its group, and how many groups there are. Raises ValueError for one in none."""
    without = next((record_id for record_id in records if record_id not in group), None)
    if without is not None:
        raise ValueError(f"record {without!r} has no group")
    names, group_N = np.unique(np.array([group[key] for key in records]), return_inverse=True)
    return group_N, len(names)


def draw_groups(groups: int, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each group is in each resample, shape (some resamples, groups) at a time; the same for every method."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, _AT_ONCE):
        count = min(_AT_ONCE, resamples - start)
        yield np.stack([np.bincount(rng.integers(groups, size=groups), minlength=groups) for _ in range(count)]).astype(
            float
        )


def draw_runs(runs: int, resamples: int, seed: int, stream: int = 1) -> NDArray[np.int64]:
    """Which runs are in each resample, shape (resamples, runs); another `stream` for a method that is drawn apart."""
    return np.random.default_rng([seed, stream]).integers(runs, size=(resamples, runs))


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


def count_confused(runs: Iterable[Sequence[Prediction]], truth: Mapping[str, str]) -> Counter[tuple[str, str]]:
    """How often each (true label_id, another label_id) came about, the other being named first; over all runs.

    Raises ValueError naming the record that has no prediction or two.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for predictions in runs:
        answers = _by_record(predictions, truth)
        for record_id, label_id in truth.items():
            first = next(iter(_named(answers[record_id])), "")
            if first and first != label_id:
                counts[label_id, first] += 1
    return counts


def record_scores(
    predictions: Sequence[Prediction], truth: Mapping[str, str], metric: str, top: int
) -> dict[str, float]:
    """The metric of each record, for metrics that are means over records; `top` as in `measure`.

    Raises ValueError naming the record that has no prediction or two, or the metric that is no such mean.
    """
    if metric not in BY_RECORD:
        raise ValueError(f"metric must be one of {', '.join(BY_RECORD)}, got {metric!r}")
    answers = _by_record(predictions, truth)
    column = BY_RECORD[metric]
    # no teacher's ranking is looked at by these columns
    return {key: float(_score(answer, truth[key], (), top, 1)[column]) for key, answer in answers.items()}


BY_RECORD = {"top_1_accuracy": 1, "top_10_accuracy": 2, "mean_reciprocal_rank": 3, "hallucination_free_accuracy": 4}
"""Metrics that are means over records, and their columns of `_score`."""


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


_TOP_1, _RANKED, _SCORED = 1, 10, 11
"""Columns of `_score` that are asked for by name."""


def _score(prediction: Prediction, label_id: str, ranking: Sequence[str], top: int, bottom: int) -> list[float]:
    """One record's part of each sum: readable, top 1, top 10, reciprocal rank, hallucination-free, items that are no
    label, items, coverage, avoidance, 1, ranked, scored, Brier score, and by bin of confidence right - confidence."""
    if ranking and len(ranking) < top + bottom:
        raise ValueError(
            f"record {prediction.record_id!r}: the teacher ranks {len(ranking)} labels, fewer than "
            f"top + bottom = {top + bottom}"
        )
    everything = _named(prediction)
    scores = prediction.scores if everything else []
    if scores and len(scores) != len(everything):
        raise ValueError(f"record {prediction.record_id!r}: {len(scores)} scores for {len(everything)} labels")
    named = everything[:top] if scores else everything
    real = {name for name in named if name}
    invented = sum(not name for name in named)
    names = len(real) + invented
    covered = avoided = 0.0
    if ranking and names:
        covered = len(real.intersection(ranking[:top])) / names
        avoided = 1 - len(real.intersection(ranking[-bottom:])) / names
    right = label_id in named[:1]
    brier, gaps = 1.0, [0.0] * BINS
    if scores:
        brier = sum((score - (name == label_id)) ** 2 for name, score in zip(everything, scores, strict=True))
        brier += label_id not in everything
        gaps[min(int(scores[0] * BINS), BINS - 1)] = right - scores[0]
    return [
        prediction.reason is None,
        right,
        label_id in named[:10],
        1 / (1 + everything.index(label_id)) if label_id in everything else 0.0,
        bool(named) and all(named),
        invented if named else 1.0,
        len(named) or 1.0,
        covered,
        avoided,
        1.0,
        bool(ranking),
        bool(scores),
        brier,
        *gaps,
    ]


def _statistics(totals: NDArray[np.float64], car_weight: float) -> dict[str, NDArray[np.float64]]:
    """The metrics of (re)samples from their column totals, shape (..., columns) to (...)."""
    readable, top_1, top_10, reciprocal, clean, invented, items, covered, avoided, records, ranked, _, brier = (
        np.moveaxis(totals[..., :-BINS], -1, 0)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        coverage, avoidance = covered / ranked, avoided / ranked
        below = car_weight * coverage + avoidance
        car = np.where(below == 0, 0.0, (1 + car_weight) * coverage * avoidance / below)
    return {
        "top_1_accuracy": top_1 / records,
        "top_10_accuracy": top_10 / records,
        "mean_reciprocal_rank": reciprocal / records,
        "hallucination_free_accuracy": clean / records,
        "hallucination_rate": invented / items,
        "coverage": coverage,
        "avoidance": avoidance,
        "car": car,
        "readable": readable / records,
        # a bin's share times its |accuracy - mean confidence| is |sum of right - sum of confidence| over all records
        "expected_calibration_error": np.abs(totals[..., -BINS:]).sum(axis=-1) / records,
        "brier_score": brier / records,
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
