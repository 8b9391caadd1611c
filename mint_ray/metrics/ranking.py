"""Metrics of predictions against the truth and the teacher, with bootstrap intervals over groups."""

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
    "top_k_accuracy",
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
"""Metrics of `measure`, in its order; all lie in [0, 1], the Brier score in [0, 2]."""

PER_RECORD_METRICS = {
    "top_1_accuracy": 1,
    "top_k_accuracy": 2,
    "mean_reciprocal_rank": 3,
    "hallucination_free_accuracy": 4,
}
"""Metrics that are means over records, and their columns of `_score`; these can be tested in pairs."""

MAX_K = 10
"""Largest k of `top_k_accuracy`; lists are seldom longer."""

BINS = 10
"""Confidence bins of equal width of the expected calibration error."""

_NEED_TEACHER = ("coverage", "avoidance", "car")
_NEED_SCORES = ("expected_calibration_error", "brier_score")
_BATCH = 100
"""Resamples evaluated together: memory grows with their number, and with groups and labels."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A metric's value and the ends of its interval; `low <= value <= high`."""

    value: float
    low: float
    high: float
    k: int | None = None
    """The k of `top_k_accuracy`; None for other metrics."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resampling:
    """Settings of bootstrap intervals and permutation tests."""

    resamples: int = 1000
    """Bootstrap samples."""
    permutations: int = 10_000
    """Permutations of a test with too many groups to enumerate."""
    confidence: float = 0.95
    """Level of the intervals, between 0 and 1."""
    seed: int = 0
    """Seed of all draws."""

    def __post_init__(self) -> None:
        if self.resamples < 1 or self.permutations < 1:
            raise ValueError(
                f"resamples and permutations must be positive, got {self.resamples} and {self.permutations}"
            )
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must lie between 0 and 1, got {self.confidence}")

    @property
    def tails(self) -> tuple[float, float]:
        """The two quantiles that bound the interval."""
        tail = (1 - self.confidence) / 2
        return tail, 1 - tail


DEFAULT_RESAMPLING = Resampling()


@dataclasses.dataclass(frozen=True)
class LabelCount:
    """Records of a true label, and how many of them name it first or among the first k."""

    count: int
    top_1: int
    top_k: int


@dataclasses.dataclass(frozen=True)
class Transitions:
    """Numbers of records by whether the answer was right before and after alignment."""

    kept: int
    """Right before and after."""
    gained: int
    """Wrong before, right after."""
    lost: int
    """Right before, wrong after."""
    neither: int
    """Wrong before and after."""


def effective_k(top: int) -> int:
    """Return the k of `top_k_accuracy` for lists of `top` labels: the whole list, up to MAX_K names."""
    return min(top, MAX_K)


def measure(
    predictions: Sequence[Prediction],
    *,
    truth: Mapping[str, str],
    teacher: Mapping[str, Sequence[str]],
    group: Mapping[str, str],
    top: int,
    bottom: int,
    car_weight: float = 1.0,
    resampling: Resampling = DEFAULT_RESAMPLING,
) -> dict[str, Estimate]:
    """Return every metric of one method on the records of `truth`, with a percentile bootstrap interval over groups.

    `truth` maps record_id to the true label_id, `teacher` to the teacher's label ids (best first), `group` to the
    group_id. `top` is the length of the lists and `bottom` that of the rejected ones. Predictions of records outside
    `truth` are ignored, so that a subgroup can be measured.

    * `top_1_accuracy`, `top_k_accuracy`: the truth is the first name, or among the first k names (`effective_k(top)`)
      as given; repeated names occupy places.
    * `mean_reciprocal_rank`: one over the rank of the truth, 0 if it is not named.
    * `macro_top_1_accuracy`: mean over the true labels of each label's top-1 accuracy.
    * `hallucination_free_accuracy`: the answer was parsed, is not empty, and every name is a label.
    * `hallucination_rate`: share of all named items that are no label; an answer that names nothing, parsed or not,
      counts as one such item.
    * `coverage`: share of the named labels in the teacher's first `top`.
    * `avoidance`: 1 - share of the named labels in the teacher's last `bottom`.
    * `car`: (1 + w) C A / (w C + A) of the mean coverage C and the mean avoidance A, where w is `car_weight`
      (arXiv 2505.05736); 0 if both are 0.
    * `readable`: share of the answers that could be parsed (`reason` is None).
    * `expected_calibration_error`: of the probability of the first label, over ten bins of equal width
      (arXiv 1706.04599); only for answers with `scores`.
    * `brier_score`: sum over labels of (probability - 1 for the truth, else 0) squared; a label that is not named has
      probability 0, and so has every label of an answer without scores among others with scores. From 0 to 2.

    In coverage and avoidance a label that is named twice counts once, and every name that is no label counts, as a
    name in neither end. An answer that names nothing, parsed or not, has coverage and avoidance 0. Records that the
    teacher did not rank are left out of these two means; if it ranked none, `coverage`, `avoidance` and `car` are left
    out of the result.

    An answer with `scores` may rank every label. All metrics but the reciprocal rank and the two of calibration use
    its first `top` labels, so that it is compared as a list of the same length as any other.

    The interval is widened to contain the value where the percentiles of a skewed `car`, or rounding, would miss it.

    Raises ValueError naming the record without a prediction, with two predictions, without a group, or with a ranking
    shorter than `top + bottom`, and for settings out of range.
    """
    return measure_runs(
        [predictions],
        truth=truth,
        teacher=teacher,
        group=group,
        top=top,
        bottom=bottom,
        car_weight=car_weight,
        resampling=resampling,
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
    resampling: Resampling = DEFAULT_RESAMPLING,
) -> dict[str, Estimate]:
    """Return `measure` of a method that was trained once with each of several seeds: the mean over its runs.

    The interval covers both sources of variation, by a two-level bootstrap: each resample draws groups with
    replacement, the same for all runs, and then runs with replacement. With few runs it is slightly too narrow,
    because the sampled runs vary less than the population of runs.
    """
    if top < 1 or bottom < 1:
        raise ValueError(f"top and bottom must be positive, got {top} and {bottom}")
    if not (math.isfinite(car_weight) and car_weight >= 0):
        raise ValueError(f"car_weight must be finite and not negative, got {car_weight}")
    if not runs:
        raise ValueError("there are no runs to measure")
    # sorted records and groups: the same rows in another order give the same bits
    records = sorted(truth)
    group_N, groups = index_groups(records, group)
    answers = [_by_record(predictions, truth) for predictions in runs]
    rows_SNM = np.array(
        [[_score(found[key], truth[key], teacher.get(key, ()), top, bottom) for key in records] for found in answers]
    )  # S runs, N records, M columns of `_score`
    statistics = _Statistics(rows_SNM, group_N, groups, [truth[key] for key in records], car_weight)
    values = {name: runs_S1[:, 0] for name, runs_S1 in statistics(np.ones((1, groups))).items()}
    chunks = [statistics(weights_RG) for weights_RG in draw_groups(groups, resampling.resamples, resampling.seed)]
    picks_RS = draw_runs(len(runs), resampling.resamples, resampling.seed)
    ranked, scored = bool(rows_SNM[..., _RANKED].any()), bool(rows_SNM[..., _SCORED].any())
    estimates = {}
    for name in METRICS:
        if (name in _NEED_TEACHER and not ranked) or (name in _NEED_SCORES and not scored):
            continue
        value = float(values[name].mean())
        draws_RS = np.concatenate([chunk[name] for chunk in chunks], axis=1).T
        draws_R = np.take_along_axis(draws_RS, picks_RS, axis=1).mean(axis=1)
        # a resample may contain no record that the teacher ranked
        known = draws_R[~np.isnan(draws_R)]
        low, high = np.quantile(known, resampling.tails) if len(known) else (value, value)
        k = effective_k(top) if name == "top_k_accuracy" else None
        estimates[name] = Estimate(value, min(float(low), value), max(float(high), value), k)
    return estimates


class _Statistics:
    """The metrics of resamples, from sums over groups."""

    def __init__(
        self,
        rows_SNM: NDArray[np.float64],
        group_N: NDArray[np.intp],
        groups: int,
        truth: Sequence[str],
        car_weight: float,
    ) -> None:
        self.car_weight = car_weight
        self.sums_SGM = np.zeros((len(rows_SNM), groups, rows_SNM.shape[2]))
        for sums_GM, rows_NM in zip(self.sums_SGM, rows_SNM, strict=True):
            np.add.at(sums_GM, group_N, rows_NM)
        labels, label_N = np.unique(np.array(truth), return_inverse=True)
        places, shape = (group_N, label_N), (groups, len(labels))
        self.counts_GL = sparse.coo_array((np.ones(len(truth)), places), shape=shape).tocsr()
        self.hits_SGL = [sparse.coo_array((rows_NM[:, _TOP_1], places), shape=shape).tocsr() for rows_NM in rows_SNM]

    def __call__(self, weights_RG: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Return each metric, shape (S runs, R resamples), given how often each group is in each resample."""
        found = _aggregate(weights_RG @ self.sums_SGM, self.car_weight)
        counts_LR = self.counts_GL.T @ weights_RG.T
        with np.errstate(invalid="ignore", divide="ignore"):
            # labels without a record in a resample are left out of its mean
            found["macro_top_1_accuracy"] = np.array(
                [np.nanmean((hits_GL.T @ weights_RG.T) / counts_LR, axis=0) for hits_GL in self.hits_SGL]
            )
        return found


def index_groups(records: Sequence[str], group: Mapping[str, str]) -> tuple[NDArray[np.intp], int]:
    """Return the index of each record's group and the number of groups. Raises ValueError for a record without one."""
    missing = next((record_id for record_id in records if record_id not in group), None)
    if missing is not None:
        raise ValueError(f"record {missing!r} has no group")
    names, group_N = np.unique(np.array([group[key] for key in records]), return_inverse=True)
    return group_N, len(names)


def draw_groups(groups: int, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Yield how often each group is in each resample, shape (batch, groups); the same for every method."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, _BATCH):
        count = min(_BATCH, resamples - start)
        yield np.stack([np.bincount(rng.integers(groups, size=groups), minlength=groups) for _ in range(count)]).astype(
            float
        )


def draw_runs(runs: int, resamples: int, seed: int, stream: int = 1) -> NDArray[np.int64]:
    """Return the runs of each resample, shape (resamples, runs); another `stream` gives an independent draw."""
    return np.random.default_rng([seed, stream]).integers(runs, size=(resamples, runs))


def count_label_hits(predictions: Sequence[Prediction], truth: Mapping[str, str], k: int) -> dict[str, LabelCount]:
    """Return the number of records and of hits of each true label_id, sorted by id; `k` is that of `top_k`.

    Raises ValueError naming the record without a prediction or with two.
    """
    answers = _by_record(predictions, truth)
    counts: dict[str, list[int]] = {label_id: [0, 0, 0] for label_id in sorted(set(truth.values()))}
    for record_id, label_id in truth.items():
        named = _named(answers[record_id])
        count = counts[label_id]
        count[0] += 1
        count[1] += label_id in named[:1]
        count[2] += label_id in named[:k]
    return {label_id: LabelCount(*count) for label_id, count in counts.items()}


def count_transitions(
    before: Sequence[Prediction], after: Sequence[Prediction], truth: Mapping[str, str], k: int
) -> Transitions:
    """Count the records that alignment made right or wrong; right means that the truth is among the first `k` names.

    Raises ValueError naming the record without a prediction or with two.
    """
    old, new = _by_record(before, truth), _by_record(after, truth)
    cells = [[0, 0], [0, 0]]
    for record_id, label_id in truth.items():
        was_right = label_id in _named(old[record_id])[:k]
        is_right = label_id in _named(new[record_id])[:k]
        cells[was_right][is_right] += 1
    return Transitions(kept=cells[1][1], gained=cells[0][1], lost=cells[1][0], neither=cells[0][0])


def count_top_1_confusions(runs: Iterable[Sequence[Prediction]], truth: Mapping[str, str]) -> Counter[tuple[str, str]]:
    """Count, over all runs, the records of each (true label_id, wrong label_id that is named first).

    Raises ValueError naming the record without a prediction or with two.
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
    """Return one of PER_RECORD_METRICS for each record; `top` as in `measure`.

    Raises ValueError naming the record without a prediction or with two, or the metric that is not such a mean.
    """
    if metric not in PER_RECORD_METRICS:
        raise ValueError(f"metric must be one of {', '.join(PER_RECORD_METRICS)}, got {metric!r}")
    answers = _by_record(predictions, truth)
    column = PER_RECORD_METRICS[metric]
    # these columns do not depend on the teacher's ranking
    return {key: float(_score(answer, truth[key], (), top, 1)[column]) for key, answer in answers.items()}


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
"""Columns of `_score` that are read by name."""


def _score(prediction: Prediction, label_id: str, ranking: Sequence[str], top: int, bottom: int) -> list[float]:
    """Return one record's contribution to each sum.

    The columns: readable, top 1, top k, reciprocal rank, hallucination-free, items that are no label, items, coverage,
    avoidance, 1, ranked, scored, Brier score, and for each confidence bin (right - confidence).
    """
    if ranking and len(ranking) < top + bottom:
        raise ValueError(
            f"record {prediction.record_id!r}: the teacher ranks {len(ranking)} labels, fewer than "
            f"top + bottom = {top + bottom}"
        )
    all_names = _named(prediction)
    scores = prediction.scores if all_names else []
    if scores and len(scores) != len(all_names):
        raise ValueError(f"record {prediction.record_id!r}: {len(scores)} scores for {len(all_names)} labels")
    named = all_names[:top] if scores else all_names
    real = {name for name in named if name}
    hallucinated = sum(not name for name in named)
    names = len(real) + hallucinated
    covered = avoided = 0.0
    if ranking and names:
        covered = len(real.intersection(ranking[:top])) / names
        avoided = 1 - len(real.intersection(ranking[-bottom:])) / names
    right = label_id in named[:1]
    brier, gaps = 1.0, [0.0] * BINS
    if scores:
        brier = sum((score - (name == label_id)) ** 2 for name, score in zip(all_names, scores, strict=True))
        brier += label_id not in all_names
        gaps[min(int(scores[0] * BINS), BINS - 1)] = right - scores[0]
    return [
        prediction.reason is None,
        right,
        label_id in named[: effective_k(top)],
        1 / (1 + all_names.index(label_id)) if label_id in all_names else 0.0,
        bool(named) and all(named),
        hallucinated if named else 1.0,
        len(named) or 1.0,
        covered,
        avoided,
        1.0,
        bool(ranking),
        bool(scores),
        brier,
        *gaps,
    ]


def _aggregate(totals: NDArray[np.float64], car_weight: float) -> dict[str, NDArray[np.float64]]:
    """Return the metrics of samples from their column totals, shape (..., columns) to (...)."""
    readable, top_1, top_k, reciprocal, clean, hallucinated, items, covered, avoided, records, ranked, _, brier = (
        np.moveaxis(totals[..., :-BINS], -1, 0)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        coverage, avoidance = covered / ranked, avoided / ranked
        denominator = car_weight * coverage + avoidance
        car = np.where(denominator == 0, 0.0, (1 + car_weight) * coverage * avoidance / denominator)
    return {
        "top_1_accuracy": top_1 / records,
        "top_k_accuracy": top_k / records,
        "mean_reciprocal_rank": reciprocal / records,
        "hallucination_free_accuracy": clean / records,
        "hallucination_rate": hallucinated / items,
        "coverage": coverage,
        "avoidance": avoidance,
        "car": car,
        "readable": readable / records,
        # a bin's share times its |accuracy - mean confidence| is |sum of right - sum of confidence| over all records
        "expected_calibration_error": np.abs(totals[..., -BINS:]).sum(axis=-1) / records,
        "brier_score": brier / records,
    }
