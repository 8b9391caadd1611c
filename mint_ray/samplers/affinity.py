"""Samplers that reject labels which are tied to the chosen ones: confused with them, or like them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Literal

from pydantic import Field

from mint_ray.config.loader import settings
from mint_ray.records import TeacherScores
from mint_ray.samplers.lists import Affinity, Ask, Knowledge, Sampler, draw_by_odds, windows


@settings
class Tied(Sampler):
    """Rejects what is most strongly tied to the chosen labels, in sum over them, told in the teacher's order.

    Labels without a tie come after all that have one, in the teacher's order, so that a pair is never lost for want
    of ties.
    """

    temperature: Annotated[
        float,
        Field(
            description="0: the strongest ties first; above it labels are drawn with odds tie ** (1 / temperature), "
            "so that 1 draws in proportion to the tie."
        ),
    ] = 0.0

    def __post_init__(self) -> None:
        Sampler.__post_init__(self)
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")

    @property
    def draws_at_random(self) -> bool:
        return self.temperature > 0

    def ties(self, knowledge: Knowledge) -> Affinity:
        """Of what is known, the ties that this sampler reads."""
        raise NotImplementedError

    def rejections(
        self, chosen: list[str], rest: list[str], scores: TeacherScores, knowledge: Knowledge
    ) -> Iterator[list[str]]:
        table = self.ties(knowledge)
        rows = [table[label] for label in chosen if label in table]
        tie = {label: sum(row.get(label, 0.0) for row in rows) for label in rest}
        for order in self._orders(rest, tie, scores.record_id):
            picked = set(order)
            yield [label for label in rest if label in picked]

    def _orders(self, rest: list[str], tie: Mapping[str, float], record_id: str) -> Iterator[list[str]]:
        count = self.rejected_length
        if self.temperature == 0:
            # sorting is stable: what ties equally stays in the teacher's order
            yield from windows(sorted(rest, key=lambda label: -tie[label]), count)
            return
        rng = self.stream(record_id)
        tied = [label for label in rest if tie[label] > 0]
        untied = [label for label in rest if tie[label] <= 0]
        log_odds = [math.log(tie[label]) / self.temperature for label in tied]
        while True:
            yield [*draw_by_odds(tied, log_odds, count, rng), *untied][:count]


@settings
class Confusion(Tied):
    """What the teacher itself confuses with the chosen labels, counted on the validation split.

    Two labels are tied by the number of validation records of either that have the other among the first `top` of
    their ranking: the lists that the student is to learn.
    """

    kind: Literal["confusion"] = "confusion"

    @property
    def asks(self) -> frozenset[Ask]:
        return frozenset({"confusions"})

    def ties(self, knowledge: Knowledge) -> Affinity:
        return knowledge.confusions


@settings
class Sibling(Tied):
    """What is near the chosen labels in the label ontology: for diseases, the likeness of their annotated findings."""

    kind: Literal["sibling"] = "sibling"

    @property
    def asks(self) -> frozenset[Ask]:
        return frozenset({"siblings"})

    def ties(self, knowledge: Knowledge) -> Affinity:
        return knowledge.siblings


def count_confusions(
    scores: Iterable[TeacherScores], truths: Iterable[str | None], top: int
) -> Counter[tuple[str, str]]:
    """How many records of a true label have each other label among the first `top` of their ranking.

    Keys are (true label, other label). Records of no known label (None among `truths`) count nowhere.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for row, truth in zip(scores, truths, strict=True):
        if truth is not None:
            counts.update((truth, other) for other in row.labels[:top] if other != truth)
    return counts


def to_affinity(counts: Mapping[tuple[str, str], int]) -> Affinity:
    """Confusions as ties, which have no direction: both ways are added up."""
    ties: Affinity = {}
    for (one, other), count in counts.items():
        for a, b in ((one, other), (other, one)):
            row = ties.setdefault(a, {})
            row[b] = row.get(b, 0.0) + count
    return ties
