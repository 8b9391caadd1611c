"""Test whether one method answers better than another on the same records, with a correction for many tests."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mint_ray.metrics.ranking import BY_RECORD, draw_groups, draw_runs, index_groups, record_scores
from mint_ray.records import Prediction

PAIRED = tuple(BY_RECORD)
"""Metrics that can be tested in pairs: means over records."""

EXACT_GROUPS = 16
"""Up to so many groups that differ, every exchange is gone through."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much better the first of two methods is, and how likely a difference as large is by chance."""

    value: float
    """Mean over records of first minus second, each the mean over its runs."""
    low: float
    high: float
    p: float
    """Two-sided, of the paired permutation test."""


def compare_pair(
    first: Sequence[Sequence[Prediction]],
    second: Sequence[Sequence[Prediction]],
    *,
    metric: str,
    top: int,
    truth: Mapping[str, str],
    group: Mapping[str, str],
    resamples: int = 1000,
    confidence: float = 0.95,
    permutations: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Difference of two methods in `metric`, one of PAIRED; each method is given by its runs, `top` is as in `measure`.

    The test exchanges the two methods' answers group by group, for answers to records of one group hang together,
    after the mean over the runs of each method was taken: it is about these trained students. The interval is of the
    bootstrap on two levels, groups and runs, and also tells of students trained anew; the two methods' runs are drawn
    apart.

    Raises ValueError naming the record that has no prediction, two predictions or no group.
    """
    records = sorted(truth)
    group_N, groups = index_groups(records, group)
    sides_SG = []
    for runs in (first, second):
        found = [record_scores(predictions, truth, metric, top) for predictions in runs]
        sides_SG.append(
            np.array([np.bincount(group_N, [scores[key] for key in records], minlength=groups) for scores in found])
        )
    differences_G = sides_SG[0].mean(axis=0) - sides_SG[1].mean(axis=0)
    sizes_G = np.bincount(group_N, minlength=groups)
    value = float(differences_G.sum() / sizes_G.sum())
    picks = [draw_runs(len(side), resamples, seed, stream) for stream, side in enumerate(sides_SG, start=1)]
    draws, start = [], 0
    for weights_RG in draw_groups(groups, resamples, seed):
        here = slice(start, start + len(weights_RG))
        means = [
            np.take_along_axis(weights_RG @ side_SG.T, picked_RS[here], axis=1).mean(axis=1)
            for side_SG, picked_RS in zip(sides_SG, picks, strict=True)
        ]
        draws.append((means[0] - means[1]) / (weights_RG @ sizes_G))
        start += len(weights_RG)
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(draws), [tail, 1 - tail])
    p = permutation_p(differences_G, permutations=permutations, seed=seed)
    return Difference(value, min(float(low), value), max(float(high), value), p)


def permutation_p(
    differences: Sequence[float] | NDArray[np.float64], permutations: int = 10_000, seed: int = 0
) -> float:
    """Two-sided p of a sum of paired differences, under exchanging the sides of each pair at random.

    Every exchange is gone through where at most EXACT_GROUPS differences are not 0; else `permutations` are drawn, and
    what was observed counts as one of them (Phipson and Smyth 2010), so that p is never 0.
    """
    known = np.asarray([difference for difference in differences if difference != 0], float)
    observed = abs(known.sum())
    # sums that are equal but for rounding are equal
    reach = observed - 1e-9 * np.abs(known).sum()
    if len(known) <= EXACT_GROUPS:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(known))))
        return float(np.mean(np.abs(signs @ known) >= reach))
    rng = np.random.default_rng(seed)
    hits, left = 0, permutations
    while left:
        count = min(left, 1_000)
        signs = rng.integers(2, size=(count, len(known))) * 2.0 - 1
        hits += int(np.sum(np.abs(signs @ known) >= reach))
        left -= count
    return (hits + 1) / (permutations + 1)


def adjust_holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): compared with a level, it keeps the chance of any false finding below it."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted
