"""Samplers that reject labels with a high affinity to the chosen ones: confused with them, or similar to them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Literal

from pydantic import Field

from mint_ray.config.loader import settings
from mint_ray.records import TeacherScores
from mint_ray.samplers.base import (
    AffinityMatrix,
    Requirement,
    Sampler,
    SamplerContext,
    chunks,
    sample_without_replacement,
)


@settings
class AffinitySampler(Sampler):
    """Sampler of the labels with the largest sum of affinities to the chosen ones, listed in the teacher's order.

    Labels of affinity 0 follow all others, in the teacher's order, so that no pair is lost for lack of affinities.
    """

    temperature: Annotated[
        float,
        Field(
            description="0: labels of the largest affinity first; otherwise labels are drawn in proportion to "
            "affinity ** (1 / temperature), so that 1 draws in proportion to the affinity."
        ),
    ] = 0.0

    def __post_init__(self) -> None:
        Sampler.__post_init__(self)
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")

    @property
    def is_random(self) -> bool:
        """True if labels are drawn (temperature above 0)."""
        return self.temperature > 0

    def affinities(self, context: SamplerContext) -> AffinityMatrix:
        """Return the affinity matrix of the context that this sampler uses."""
        raise NotImplementedError

    def iter_rejected(
        self, chosen: list[str], remaining: list[str], scores: TeacherScores, context: SamplerContext
    ) -> Iterator[list[str]]:
        """Yield the labels of largest affinity, then the ones after them; at a temperature, draws without end."""
        matrix = self.affinities(context)
        rows = [matrix[label] for label in chosen if label in matrix]
        affinity = {label: sum(row.get(label, 0.0) for row in rows) for label in remaining}
        for labels in self._iter_selections(remaining, affinity, scores.record_id):
            selected = set(labels)
            yield [label for label in remaining if label in selected]

    def _iter_selections(
        self, remaining: list[str], affinity: Mapping[str, float], record_id: str
    ) -> Iterator[list[str]]:
        count = self.num_rejected
        if self.temperature == 0:
            # sorting is stable: labels of equal affinity stay in the teacher's order
            yield from chunks(sorted(remaining, key=lambda label: -affinity[label]), count)
            return
        rng = self.record_rng(record_id)
        related = [label for label in remaining if affinity[label] > 0]
        unrelated = [label for label in remaining if affinity[label] <= 0]
        log_weights = [math.log(affinity[label]) / self.temperature for label in related]
        while True:
            yield [*sample_without_replacement(related, log_weights, count, rng), *unrelated][:count]


@settings
class Confusion(AffinitySampler):
    """Sampler of the labels that the teacher confuses with the chosen ones, counted on the validation split.

    The affinity of two labels is the number of validation records of either that have the other among the first `top`
    labels of their ranking, which are the lists that the student learns.
    """

    kind: Literal["confusion"] = "confusion"

    @property
    def requires(self) -> frozenset[Requirement]:
        """Fields of the context that must be computed: the confusions."""
        return frozenset({"confusions"})

    def affinities(self, context: SamplerContext) -> AffinityMatrix:
        """Return the confusions."""
        return context.confusions


@settings
class Sibling(AffinitySampler):
    """Sampler of the labels most similar to the chosen ones in the ontology, by the annotated findings of diseases."""

    kind: Literal["sibling"] = "sibling"

    @property
    def requires(self) -> frozenset[Requirement]:
        """Fields of the context that must be computed: the siblings."""
        return frozenset({"siblings"})

    def affinities(self, context: SamplerContext) -> AffinityMatrix:
        """Return the similarities."""
        return context.siblings


def count_confusions(
    scores: Iterable[TeacherScores], truths: Iterable[str | None], top: int
) -> Counter[tuple[str, str]]:
    """Count the records of each true label that have each other label among the first `top` of their ranking.

    Keys are (true label, other label). Records without a known label (None in `truths`) are skipped.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for row, truth in zip(scores, truths, strict=True):
        if truth is not None:
            counts.update((truth, other) for other in row.labels[:top] if other != truth)
    return counts


def to_affinity_matrix(counts: Mapping[tuple[str, str], int]) -> AffinityMatrix:
    """Return confusion counts as a symmetric affinity matrix: the sum of both directions."""
    matrix: AffinityMatrix = {}
    for (one, other), count in counts.items():
        for a, b in ((one, other), (other, one)):
            row = matrix.setdefault(a, {})
            row[b] = row.get(b, 0.0) + count
    return matrix
