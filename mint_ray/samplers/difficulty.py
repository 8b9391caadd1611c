"""Difficulty of a preference pair, by the teacher's scores."""

from __future__ import annotations

from collections.abc import Sequence

from mint_ray.records import TeacherScores
from mint_ray.samplers.base import score_range


def difficulty(scores: TeacherScores, chosen: Sequence[str], rejected: Sequence[str]) -> float:
    """Return how weakly the teacher prefers `chosen`, 0 (easy) to 1 (hard); a curriculum sorts by it, easy first.

    1 - (mean score of chosen - mean score of rejected) / (best - worst score of the record), clipped to 0 to 1. It is 0
    if all chosen labels have the best score and all rejected ones the worst. It is 1 if the teacher scores the rejected
    labels as high or higher, if all scores are equal, and if both lists have the same labels in another order.
    """
    unit = score_range(scores)
    if unit == 0:
        return 1.0
    score = dict(zip(scores.labels, scores.scores, strict=True))
    gap = sum(score[label] for label in chosen) / len(chosen) - sum(score[label] for label in rejected) / len(rejected)
    return min(max(1.0 - gap / unit, 0.0), 1.0)
