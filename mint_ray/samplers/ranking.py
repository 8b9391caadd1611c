"""Samplers that select the rejected labels by the teacher's ranking of the record."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from mint_ray.config.loader import settings
from mint_ray.records import TeacherScores
from mint_ray.samplers.base import Sampler, SamplerContext, chunks, sample_without_replacement, score_range


@settings
class TopBottom(Sampler):
    """Sampler of the last ranks, as in the paper: easy negatives, on which the odds-ratio term soon saturates."""

    kind: Literal["top_bottom"] = "top_bottom"

    def iter_rejected(
        self, chosen: list[str], remaining: list[str], scores: TeacherScores, context: SamplerContext
    ) -> Iterator[list[str]]:
        """Yield the last ranks, then the ones before them."""
        for end in range(len(remaining), 0, -self.num_rejected):
            yield remaining[max(end - self.num_rejected, 0) : end]


@settings
class Hard(Sampler):
    """Sampler of the ranks just below the chosen ones: hard negatives, which the teacher scores almost as high."""

    kind: Literal["hard"] = "hard"

    def iter_rejected(
        self, chosen: list[str], remaining: list[str], scores: TeacherScores, context: SamplerContext
    ) -> Iterator[list[str]]:
        """Yield the next ranks, then the ones after them."""
        return chunks(remaining, self.num_rejected)


@settings
class Margin(Sampler):
    """Sampler of the best ranks whose score is at least `margin` below that of the worst chosen label."""

    kind: Literal["margin"] = "margin"
    margin: float = 0.1
    """Minimum gap, in units of the record's score range (0 to 1)."""

    def __post_init__(self) -> None:
        Sampler.__post_init__(self)
        if not 0 <= self.margin <= 1:
            raise ValueError(f"margin must lie in 0 to 1, got {self.margin}")

    def iter_rejected(
        self, chosen: list[str], remaining: list[str], scores: TeacherScores, context: SamplerContext
    ) -> Iterator[list[str]]:
        """Yield the best ranks below the gap, then the ones after them."""
        score = dict(zip(scores.labels, scores.scores, strict=True))
        limit = min(score[label] for label in chosen) - self.margin * score_range(scores)
        return chunks([label for label in remaining if score[label] <= limit], self.num_rejected)


@settings
class Uniform(Sampler):
    """Sampler of random ranks below the chosen ones, uniform or weighted by score, listed in the teacher's order."""

    kind: Literal["uniform"] = "uniform"
    temperature: float | None = None
    """Labels are drawn in proportion to exp(score / temperature), the score in units of the record's score range (0 to
    1): a low temperature prefers the ranks just below the chosen ones, a high one approaches uniform; null: uniform."""

    def __post_init__(self) -> None:
        Sampler.__post_init__(self)
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")

    @property
    def is_random(self) -> bool:
        """True: labels are drawn."""
        return True

    def iter_rejected(
        self, chosen: list[str], remaining: list[str], scores: TeacherScores, context: SamplerContext
    ) -> Iterator[list[str]]:
        """Yield independent draws, without end."""
        rng, count = self.record_rng(scores.record_id), min(self.num_rejected, len(remaining))
        log_weights: list[float] = []
        if self.temperature is not None:
            score, unit = dict(zip(scores.labels, scores.scores, strict=True)), score_range(scores) or 1.0
            log_weights = [score[label] / unit / self.temperature for label in remaining]
        while True:
            drawn = (
                sample_without_replacement(remaining, log_weights, count, rng)
                if log_weights
                else rng.sample(remaining, count)
            )
            selected = set(drawn)
            yield [label for label in remaining if label in selected]


@settings
class Permuted(Sampler):
    """Sampler of the chosen labels in another order: the student learns the order and nothing else.

    Orders are distinct, so a record gives at most top! - 1 pairs.
    """

    kind: Literal["permuted"] = "permuted"

    def __post_init__(self) -> None:
        Sampler.__post_init__(self)
        if self.top < 2:
            raise ValueError(f"top must be 2 or more for there to be another order, got {self.top}")
        if self.num_rejected != self.top:
            raise ValueError(
                f"bottom must equal top or be null, because both lists have the same labels, got {self.bottom}"
            )

    @property
    def min_labels(self) -> int:
        """Minimum number of labels of the task: those of one list."""
        return self.top

    @property
    def is_random(self) -> bool:
        """True: orders are drawn."""
        return True

    def iter_rejected(
        self, chosen: list[str], remaining: list[str], scores: TeacherScores, context: SamplerContext
    ) -> Iterator[list[str]]:
        """Yield every other order of the chosen labels once, in random order."""
        rng = self.record_rng(scores.record_id)
        seen = {tuple(chosen)}
        for _ in range(math.factorial(len(chosen)) - 1):
            order = chosen
            while tuple(order) in seen:
                order = rng.sample(chosen, len(chosen))
            seen.add(tuple(order))
            yield order
