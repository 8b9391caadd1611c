"""The interface of samplers, and code shared by their implementations."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Literal

from pydantic import Field

from mint_ray.config.loader import UserError, settings
from mint_ray.records import TeacherScores

ChosenRejected = tuple[list[str], list[str]]
"""Label ids of the chosen and of the rejected list."""

AffinityMatrix = dict[str, dict[str, float]]
"""Affinity of each label to others, larger is stronger; a missing entry is 0."""

Requirement = Literal["confusions", "siblings"]
"""Data besides the scores that a sampler can require; computed once for all records."""


@dataclass(frozen=True, kw_only=True)
class SamplerContext:
    """Data computed once for all records; a field is empty unless the sampler requires it."""

    confusions: AffinityMatrix = field(default_factory=dict)
    """Confusion counts of pairs of labels."""
    siblings: AffinityMatrix = field(default_factory=dict)
    """Similarity of two labels in the ontology."""
    student_rankings: Mapping[str | None, Mapping[str, list[str]]] = field(default_factory=dict)
    """By student (URI of its train artifact, None for the base student) and record_id: labels, most likely first."""


EMPTY_CONTEXT = SamplerContext()


@settings
class Sampler:
    """Settings of every sampler: the lengths of the two lists, pairs per record, and the place of the true label.

    A member implements `iter_rejected`, or `draw` if it also selects the chosen labels.
    """

    kind: str
    # described in the annotation, for a docstring under a field is not inherited by the members' schemas
    top: Annotated[int, Field(description="Labels in the chosen list; the paper's k.")] = 3
    bottom: Annotated[
        int | None,
        Field(description="Labels in the rejected list, the paper's q; null: as many as `top`."),
    ] = None
    pairs_per_record: Annotated[
        int,
        Field(description="Maximum number of pairs of one record; they differ in their rejected labels."),
    ] = 1
    truth_first: Annotated[
        bool,
        Field(description="Put the known true label first in `chosen`, wherever the teacher ranks it."),
    ] = False
    seed: Annotated[int, Field(description="Seed of random draws; each record has its own random stream.")] = 0

    def __post_init__(self) -> None:
        if self.top < 1 or self.num_rejected < 1:
            raise ValueError(f"top and bottom must be positive, got {self.top} and {self.bottom}")
        if self.pairs_per_record < 1:
            raise ValueError(f"pairs_per_record must be positive, got {self.pairs_per_record}")

    @property
    def num_rejected(self) -> int:
        """Labels in the rejected list."""
        return self.top if self.bottom is None else self.bottom

    @property
    def min_labels(self) -> int:
        """Minimum number of labels of the task."""
        return self.top + self.num_rejected

    @property
    def requires(self) -> frozenset[Requirement]:
        """Fields of the context that must be computed."""
        return frozenset()

    @property
    def required_students(self) -> frozenset[str | None]:
        """Students whose rankings must be in the context: URIs of train artifacts, None for the base student."""
        return frozenset()

    @property
    def is_random(self) -> bool:
        """True if another seed gives other pairs."""
        return False

    def check_num_labels(self, num_labels: int) -> None:
        """Raise UserError if a task of `num_labels` labels has too few for one pair."""
        if self.min_labels > num_labels:
            raise UserError(
                f"pair.sampler: top {self.top} and bottom {self.num_rejected} need more labels than the task's "
                f"{num_labels}"
            )

    def for_record(self, record_id: str) -> Sampler:
        """Return the sampler that draws this record's pairs; another one only for a mixture."""
        return self

    def draw(
        self, scores: TeacherScores, truth: str | None, context: SamplerContext = EMPTY_CONTEXT
    ) -> list[ChosenRejected]:
        """Return at most `pairs_per_record` distinct pairs of label lists of one record.

        Fewer, or none, are returned if the ranking has too few labels that meet the sampler's condition.
        """
        ranking = scores.labels
        if self.truth_first and truth is not None:
            ranking = [truth, *(label for label in ranking if label != truth)]
        chosen, remaining = ranking[: self.top], ranking[self.top :]
        pairs: list[ChosenRejected] = []
        for rejected in islice(self.iter_rejected(chosen, remaining, scores, context), self.pairs_per_record):
            if len(rejected) == self.num_rejected and (chosen, rejected) not in pairs:
                pairs.append((chosen, rejected))
        return pairs

    def iter_rejected(
        self, chosen: list[str], remaining: list[str], scores: TeacherScores, context: SamplerContext
    ) -> Iterator[list[str]]:
        """Yield one rejected list per pair, from the labels ranked below `chosen` (`remaining`, best first).

        `draw` skips a list of another length than `num_rejected`, and takes the first `pairs_per_record` lists, so the
        iterator may be infinite.
        """
        raise NotImplementedError

    def count_fallbacks(self, record_id: str, rejected: list[str], context: SamplerContext) -> int:
        """Return the number of rejected labels that only fill up the list, because too few met the condition."""
        return 0

    def record_rng(self, record_id: str) -> random.Random:
        """Return the record's own random stream: the same pairs are drawn on one worker and on fifty."""
        return random.Random(f"{self.seed}:{record_id}")


def score_range(scores: TeacherScores) -> float:
    """Return the best minus the worst score of a record."""
    return scores.scores[0] - scores.scores[-1]


def chunks(labels: list[str], length: int) -> Iterator[list[str]]:
    """Yield consecutive lists of `length` labels; the last one may be shorter."""
    for start in range(0, len(labels), length):
        yield labels[start : start + length]


def sample_without_replacement(
    labels: Sequence[str], log_weights: Sequence[float], count: int, rng: random.Random
) -> list[str]:
    """Return `count` labels drawn one after the other without replacement, in proportion to exp(log_weights).

    Implemented as the `count` largest sums of log-weight and Gumbel noise, which has the same distribution (Kool et
    al., ICML 2019, arXiv 1903.06059).
    """
    keys = [weight - math.log(rng.expovariate(1.0) or sys.float_info.min) for weight in log_weights]
    order = sorted(range(len(labels)), key=lambda index: -keys[index])
    return [labels[index] for index in order[:count]]
