"""Samplers that read one record's ranking and nothing else."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Literal

from pydantic import Field

from mint_ray.config.loader import settings
from mint_ray.records import TeacherScores

Split = tuple[list[str], list[str]]
"""Label ids: chosen, rejected."""

Affinity = dict[str, dict[str, float]]
"""How strongly a label is tied to others: larger is stronger, and a label that is not there is not tied at all."""

Ask = Literal["confusions", "siblings"]
"""What a sampler may need besides the scores of the record, worked out once for all records."""


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What was worked out for the samplers that ask; a field is empty where none does."""

    confusions: Affinity = field(default_factory=dict)
    siblings: Affinity = field(default_factory=dict)
    answers: Mapping[str | None, Mapping[str, list[str]]] = field(default_factory=dict)
    """By student (the URI of its train artifact, None for the base student) and record: labels, likeliest first."""


NOTHING = Knowledge()


@settings
class Sampler:
    """What every sampler has: the sizes of the two lists, pairs per record, and the place of the true label."""

    kind: str
    # described in the annotation, for a docstring under a field is not inherited by the members' schemas
    top: Annotated[int, Field(description="Labels in the chosen list; the paper's k.")] = 3
    bottom: Annotated[
        int | None,
        Field(description="Labels in the rejected list, the paper's q; null: as many as `top`."),
    ] = None
    pairs_per_record: Annotated[
        int,
        Field(description="Pairs drawn from one record, each with other rejected labels as long as there are others."),
    ] = 1
    truth_first: Annotated[
        bool,
        Field(description="Put the known true label first in `chosen`, whatever the teacher says of it."),
    ] = False
    seed: Annotated[
        int, Field(description="Seed of what is drawn at random; each record draws from its own stream.")
    ] = 0

    def __post_init__(self) -> None:
        if self.top < 1 or self.rejected_length < 1:
            raise ValueError(f"top and bottom must be positive, got {self.top} and {self.bottom}")
        if self.pairs_per_record < 1:
            raise ValueError(f"pairs_per_record must be positive, got {self.pairs_per_record}")

    @property
    def rejected_length(self) -> int:
        return self.top if self.bottom is None else self.bottom

    @property
    def least_labels(self) -> int:
        """Fewest labels a task must have for one pair."""
        return self.top + self.rejected_length

    @property
    def asks(self) -> frozenset[Ask]:
        """What `draw` must be given in its `knowledge`."""
        return frozenset()

    @property
    def students(self) -> frozenset[str | None]:
        """Whose answers `draw` must be given in its `knowledge`, as `Knowledge.answers` names them."""
        return frozenset()

    def for_record(self, record_id: str) -> Sampler:
        """The sampler that draws this record's pairs."""
        return self

    def draw(self, scores: TeacherScores, truth: str | None, knowledge: Knowledge = NOTHING) -> list[Split]:
        """The preferred and rejected lists of one record, `pairs_per_record` of them at most, no two of them equal.

        Fewer, or none, come back where the ranking does not hold enough labels that meet the sampler's condition.
        """
        ranking = scores.labels
        if self.truth_first and truth is not None:
            ranking = [truth, *(label for label in ranking if label != truth)]
        chosen, rest = ranking[: self.top], ranking[self.top :]
        drawn: list[Split] = []
        for rejected in islice(self.rejections(chosen, rest, scores, knowledge), self.pairs_per_record):
            if len(rejected) == self.rejected_length and (chosen, rejected) not in drawn:
                drawn.append((chosen, rejected))
        return drawn

    @property
    def draws_at_random(self) -> bool:
        """Whether another seed gives other pairs."""
        return False

    def rejections(
        self, chosen: list[str], rest: list[str], scores: TeacherScores, knowledge: Knowledge
    ) -> Iterator[list[str]]:
        """Rejected lists of one pair after the other, from the ranks below the cut (`rest`, best first).

        A list of the wrong length is no pair; it may go on for ever.
        """
        raise NotImplementedError

    def filled(self, record_id: str, rejected: list[str], knowledge: Knowledge) -> int:
        """How many labels of a rejected list stand in for what the sampler looks for and did not find."""
        return 0

    def stream(self, record_id: str) -> random.Random:
        """The record's own random numbers: the same on one worker or fifty."""
        return random.Random(f"{self.seed}:{record_id}")


@settings
class TopBottom(Sampler):
    """The paper's: the last ranks. Easy to tell apart, so the odds-ratio term soon has nothing to teach."""

    kind: Literal["top_bottom"] = "top_bottom"

    def rejections(
        self, chosen: list[str], rest: list[str], scores: TeacherScores, knowledge: Knowledge
    ) -> Iterator[list[str]]:
        for end in range(len(rest), 0, -self.rejected_length):
            yield rest[max(end - self.rejected_length, 0) : end]


@settings
class Hard(Sampler):
    """The ranks just below the cut: what the teacher itself nearly believed."""

    kind: Literal["hard"] = "hard"

    def rejections(
        self, chosen: list[str], rest: list[str], scores: TeacherScores, knowledge: Knowledge
    ) -> Iterator[list[str]]:
        return windows(rest, self.rejected_length)


@settings
class Margin(Sampler):
    """The best ranks whose score lies at least `margin` below the worst chosen one."""

    kind: Literal["margin"] = "margin"
    margin: float = 0.1
    """Least gap, in units of the record's own score range (0 to 1)."""

    def __post_init__(self) -> None:
        Sampler.__post_init__(self)
        if not 0 <= self.margin <= 1:
            raise ValueError(f"margin must lie in 0 to 1, got {self.margin}")

    def rejections(
        self, chosen: list[str], rest: list[str], scores: TeacherScores, knowledge: Knowledge
    ) -> Iterator[list[str]]:
        score = dict(zip(scores.labels, scores.scores, strict=True))
        cut = min(score[label] for label in chosen) - self.margin * score_range(scores)
        return windows([label for label in rest if score[label] <= cut], self.rejected_length)


@settings
class Uniform(Sampler):
    """Drawn from all ranks below the cut, evenly or with a leaning to what the teacher scores high, told in its
    order."""

    kind: Literal["uniform"] = "uniform"
    temperature: float | None = None
    """Labels are drawn with odds exp(score / temperature), the score in units of the record's own range (0 to 1): a
    small one draws the ranks just below the cut, a large one evenly; null: evenly."""

    def __post_init__(self) -> None:
        Sampler.__post_init__(self)
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")

    @property
    def draws_at_random(self) -> bool:
        return True

    def rejections(
        self, chosen: list[str], rest: list[str], scores: TeacherScores, knowledge: Knowledge
    ) -> Iterator[list[str]]:
        rng, count = self.stream(scores.record_id), min(self.rejected_length, len(rest))
        log_odds: list[float] = []
        if self.temperature is not None:
            score, unit = dict(zip(scores.labels, scores.scores, strict=True)), score_range(scores) or 1.0
            log_odds = [score[label] / unit / self.temperature for label in rest]
        while True:
            picked = set(draw_by_odds(rest, log_odds, count, rng) if log_odds else rng.sample(rest, count))
            yield [label for label in rest if label in picked]


@settings
class Permuted(Sampler):
    """The chosen labels themselves in another order: teaches the order and nothing else.

    No order comes twice; at most top! - 1 pairs come of one record.
    """

    kind: Literal["permuted"] = "permuted"

    def __post_init__(self) -> None:
        Sampler.__post_init__(self)
        if self.top < 2:
            raise ValueError(f"top must be 2 or more for there to be another order, got {self.top}")
        if self.rejected_length != self.top:
            raise ValueError(f"bottom must be top or null, for the labels are the same, got {self.bottom}")

    @property
    def least_labels(self) -> int:
        return self.top

    @property
    def draws_at_random(self) -> bool:
        return True

    def rejections(
        self, chosen: list[str], rest: list[str], scores: TeacherScores, knowledge: Knowledge
    ) -> Iterator[list[str]]:
        rng = self.stream(scores.record_id)
        seen = {tuple(chosen)}
        for _ in range(math.factorial(len(chosen)) - 1):
            order = chosen
            while tuple(order) in seen:
                order = rng.sample(chosen, len(chosen))
            seen.add(tuple(order))
            yield order


@settings
class Truth(Sampler):
    """The known true label and no teacher: what the teacher's ranking adds is seen against this.

    `chosen` is the true label and behind it labels drawn evenly from all others, so that lists are as long as anyone's;
    `rejected` are others again. A record without a known label gives no pair.
    """

    kind: Literal["truth"] = "truth"

    @property
    def draws_at_random(self) -> bool:
        return True

    def draw(self, scores: TeacherScores, truth: str | None, knowledge: Knowledge = NOTHING) -> list[Split]:
        if truth is None:
            return []
        rng = self.stream(scores.record_id)
        if len(scores.labels) < self.least_labels:
            return []
        # by id: the teacher's order must not be in the draw
        others = sorted(label for label in scores.labels if label != truth)
        behind = rng.sample(others, self.top - 1)
        chosen, left = [truth, *behind], [label for label in others if label not in behind]
        drawn: list[Split] = []
        for _ in range(self.pairs_per_record):
            rejected = rng.sample(left, self.rejected_length)
            if (chosen, rejected) not in drawn:
                drawn.append((chosen, rejected))
        return drawn


def difficulty(scores: TeacherScores, chosen: Sequence[str], rejected: Sequence[str]) -> float:
    """How little the teacher prefers `chosen`, 0 (easy) to 1 (hard): the key of a curriculum, which starts at 0.

    1 - (mean score of chosen - mean score of rejected) / (best - worst score of the record), and no more than 1: where
    the teacher scores the rejected labels as high, or higher, or all labels alike. 0 where chosen has the best score
    throughout and rejected the worst. The same labels in another order are 1, whatever the order.
    """
    unit = score_range(scores)
    if unit == 0:
        return 1.0
    score = dict(zip(scores.labels, scores.scores, strict=True))
    gap = sum(score[label] for label in chosen) / len(chosen) - sum(score[label] for label in rejected) / len(rejected)
    return min(max(1.0 - gap / unit, 0.0), 1.0)


def score_range(scores: TeacherScores) -> float:
    """Best minus worst score of a record."""
    return scores.scores[0] - scores.scores[-1]


def windows(labels: list[str], length: int) -> Iterator[list[str]]:
    """The first `length` labels, the next, and so on; the last may be shorter."""
    for start in range(0, len(labels), length):
        yield labels[start : start + length]


def draw_by_odds(labels: Sequence[str], log_odds: Sequence[float], count: int, rng: random.Random) -> list[str]:
    """`count` labels drawn one after the other, without putting back, with odds exp(log_odds).

    By the largest of log odds plus Gumbel noise, which is the same (Kool et al., ICML 2019, arXiv 1903.06059).
    """
    keys = [odds - math.log(rng.expovariate(1.0) or sys.float_info.min) for odds in log_odds]
    order = sorted(range(len(labels)), key=lambda index: -keys[index])
    return [labels[index] for index in order[:count]]
