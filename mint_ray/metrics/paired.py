"""Paired tests of two methods on the same records, with a correction for multiple tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mint_ray.metrics.ranking import DEFAULT_RESAMPLING, Resampling, draw_groups, draw_runs, index_groups, record_scores
from mint_ray.records import Prediction

MAX_EXACT_GROUPS = 16
"""Number of differing groups up to which every exchange is enumerated."""

BATCH = 1_000
"""Permutations evaluated together."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference of two methods in one metric, with its interval and p-value."""

    value: float
    """Mean over records of first minus second, each averaged over its runs."""
    low: float
    high: float
    p: float
    """Two-sided p-value of the paired permutation test."""


def compare_pair(
    first: Sequence[Sequence[Prediction]],
    second: Sequence[Sequence[Prediction]],
    *,
    metric: str,
    top: int,
    truth: Mapping[str, str],
    group: Mapping[str, str],
    resampling: Resampling = DEFAULT_RESAMPLING,
) -> Difference:
    """Return the difference of two methods in `metric`; each method is given by its runs (one per seed).

    `metric` is one of PER_RECORD_METRICS; `top`, `truth` and `group` are those of `measure`.

    The permutation test exchanges the answers of the two methods group by group, because answers to records of one
    group are dependent, after averaging over the runs of each method. Its p-value is conditional on the trained
    students. The interval is a two-level bootstrap over groups and runs, so it also covers retraining; the runs of the
    two methods are drawn independently.

    Raises ValueError naming the record without a prediction, with two predictions or without a group.
    """
    records = sorted(truth)
    group_N, groups = index_groups(records, group)
    sides_SG = []
    for runs in (first, second):
        scores = [record_scores(predictions, truth, metric, top) for predictions in runs]
        sides_SG.append(
            np.array([np.bincount(group_N, [run[key] for key in records], minlength=groups) for run in scores])
        )
    differences_G = sides_SG[0].mean(axis=0) - sides_SG[1].mean(axis=0)
    sizes_G = np.bincount(group_N, minlength=groups)
    value = float(differences_G.sum() / sizes_G.sum())
    picks = [
        draw_runs(len(side), resampling.resamples, resampling.seed, stream)
        for stream, side in enumerate(sides_SG, start=1)
    ]
    draws, start = [], 0
    for weights_RG in draw_groups(groups, resampling.resamples, resampling.seed):
        rows = slice(start, start + len(weights_RG))
        means = [
            np.take_along_axis(weights_RG @ side_SG.T, picked_RS[rows], axis=1).mean(axis=1)
            for side_SG, picked_RS in zip(sides_SG, picks, strict=True)
        ]
        draws.append((means[0] - means[1]) / (weights_RG @ sizes_G))
        start += len(weights_RG)
    low, high = np.quantile(np.concatenate(draws), resampling.tails)
    p = permutation_p(differences_G, permutations=resampling.permutations, seed=resampling.seed)
    return Difference(value, min(float(low), value), max(float(high), value), p)


def permutation_p(
    differences: Sequence[float] | NDArray[np.float64], permutations: int = 10_000, seed: int = 0
) -> float:
    """Return the two-sided p-value of a sum of paired differences under random exchanges of the two sides.

    All exchanges are enumerated if at most MAX_EXACT_GROUPS differences are nonzero; otherwise `permutations` are drawn
    and the observed data count as one of them (Phipson and Smyth 2010), so that p is never 0.
    """
    from scipy import stats  # a second of import that only comparisons need

    nonzero = np.asarray([difference for difference in differences if difference != 0], float)
    if len(nonzero) < 2:
        return 1.0  # either sign is as extreme; scipy takes two or more
    # sums that are equal up to rounding count as ties, which scipy's own tolerance is too narrow for
    threshold = abs(nonzero.sum()) - 1e-9 * np.abs(nonzero).sum()

    def is_extreme(sample: NDArray[np.float64], axis: int) -> NDArray[np.bool_]:
        extreme: NDArray[np.bool_] = np.abs(sample.sum(axis=axis)) >= threshold
        return extreme

    # of one sample, scipy's "samples" permutations are flips of the signs
    result: Any = stats.permutation_test(
        (nonzero,),
        is_extreme,
        permutation_type="samples",
        alternative="greater",
        n_resamples=np.inf if len(nonzero) <= MAX_EXACT_GROUPS else permutations,
        batch=BATCH,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def adjust_holm(values: Sequence[float]) -> list[float]:
    """Return p-values with Holm's step-down adjustment (1979), which controls the family-wise error rate.

    scipy offers only corrections of the false discovery rate (`scipy.stats.false_discovery_control`).
    """
    order = sorted(range(len(values)), key=lambda index: values[index])
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted
