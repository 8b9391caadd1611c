"""Adaptive retrieval: keep the passages that increase the student's confidence in its answer.

Let p(y | x, S) be the student's probability of naming label y first, given note x and passages S, normalized over the
labels of the task. Its confidence is c(S) = max over y of log p(y | x, S). Starting with no passages, and trying them
best match first, a passage d is added to S if c(S + d) > c(S). So the final set was scored itself, and every passage in
it increased the confidence when it was added.

The true label is not used: y runs over all labels alike. Higher confidence does not imply a correct answer: a student
that repeats what it reads becomes more confident with any passage.

The idea that the model itself decides which retrieved passages are useful is that of RA-BLIP (arXiv 2410.14154), which
trains it for that; here only its likelihoods are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

Passage = TypeVar("Passage")


def confidence(logps: Sequence[float]) -> float:
    """Return the log-probability of the best candidate among the candidates; at most 0.

    `logps` are log-probabilities up to a common constant.
    """
    best = max(logps)
    # subtracted before the exponential, to avoid underflow
    return -math.log(sum(math.exp(logp - best) for logp in logps))


def select_passages(
    passages: Sequence[Passage], confidence_with: Callable[[list[Passage]], float]
) -> tuple[list[Passage], list[float]]:
    """Return the selected passages, and the confidence without passages and with each passage that was tried."""
    selected: list[Passage] = []
    best = confidence_with(selected)
    tried = [best]
    for passage in passages:
        value = confidence_with([*selected, passage])
        tried.append(value)
        if value > best:
            selected, best = [*selected, passage], value
    return selected, tried
