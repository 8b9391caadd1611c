"""Keep the passages with which a student is surer of its answer than without.

The criterion. Let p(y | x, S) be the student's probability of naming label y first, given note x and passages S, made
to sum to 1 over the candidate labels of the task. Its confidence is c(S) = max over y of log p(y | x, S). Beginning
with none, and taking passages best match first, a passage d joins S if c(S + d) > c(S). So what is shown in the end
was itself scored, and no passage is in it that made the student less sure when it came.

No truth is used: y runs over all labels alike, and which of them is the record's own is nowhere asked. Being surer is
not being right: a student that repeats what it reads grows surer by any passage.

After the idea of RA-BLIP (arXiv 2410.14154) that the model itself tells which of what was retrieved is of use; there it
is trained to, here its likelihoods are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

Passage = TypeVar("Passage")


def confidence(logps: Sequence[float]) -> float:
    """Log-probability of the best candidate, given that the answer is one of the candidates; at most 0."""
    best = max(logps)
    # the best is taken out ahead of the sum, so that none of it underflows
    return -math.log(sum(math.exp(logp - best) for logp in logps))


def keep_rising(
    passages: Sequence[Passage], confidence_with: Callable[[list[Passage]], float]
) -> tuple[list[Passage], list[float]]:
    """The passages that join, and the confidence with none and with each that was tried added to what had joined."""
    kept: list[Passage] = []
    best = confidence_with(kept)
    tried = [best]
    for passage in passages:
        with_it = confidence_with([*kept, passage])
        tried.append(with_it)
        if with_it > best:
            kept, best = [*kept, passage], with_it
    return kept, tried
