"""Choose which labels a teacher's scores make preferred and which rejected."""

from __future__ import annotations

import random
from typing import Annotated, Literal

from pydantic import Field

from mint_ray.loading import settings
from mint_ray.records import TeacherScores

Split = tuple[list[str], list[str]]
"""Label ids: chosen, rejected."""


@settings
class Sampler:
    """What every sampler has: the sizes of the two lists, pairs per record, and the place of the true label."""

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

    def draw(self, scores: TeacherScores, truth: str | None) -> list[Split]:
        """The preferred and rejected lists of one record, `pairs_per_record` of them at most.

        Fewer, or none, come back where the ranking does not hold enough labels that meet the sampler's condition.
        """
        ranking = list(scores.labels)
        if self.truth_first and truth is not None:
            ranking = [truth, *(label for label in ranking if label != truth)]
        chosen, rest = ranking[: self.top], ranking[self.top :]
        rng = random.Random(f"{self.seed}:{scores.record_id}")
        drawn: list[Split] = []
        for turn in range(self.pairs_per_record):
            rejected = self.rejected(rest, scores, chosen, turn, rng)
            if len(rejected) == self.rejected_length and (chosen, rejected) not in drawn:
                drawn.append((chosen, rejected))
        return drawn

    def rejected(
        self, rest: list[str], scores: TeacherScores, chosen: list[str], turn: int, rng: random.Random
    ) -> list[str]:
        """Labels of the rejected list of pair number `turn`, from the ranks below the cut (`rest`, best first)."""
        raise NotImplementedError


@settings
class TopBottom(Sampler):
    """The paper's: the last ranks. Easy to tell apart, so the odds-ratio term soon has nothing to teach."""

    kind: Literal["top_bottom"] = "top_bottom"

    def rejected(
        self, rest: list[str], scores: TeacherScores, chosen: list[str], turn: int, rng: random.Random
    ) -> list[str]:
        end = len(rest) - turn * self.rejected_length
        return rest[max(end - self.rejected_length, 0) : max(end, 0)]


@settings
class Hard(Sampler):
    """The ranks just below the cut: what the teacher itself nearly believed."""

    kind: Literal["hard"] = "hard"

    def rejected(
        self, rest: list[str], scores: TeacherScores, chosen: list[str], turn: int, rng: random.Random
    ) -> list[str]:
        start = turn * self.rejected_length
        return rest[start : start + self.rejected_length]


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

    def rejected(
        self, rest: list[str], scores: TeacherScores, chosen: list[str], turn: int, rng: random.Random
    ) -> list[str]:
        score = dict(zip(scores.labels, scores.scores, strict=True))
        gap = self.margin * (scores.scores[0] - scores.scores[-1])
        cut = min(score[label] for label in chosen) - gap
        below = [label for label in rest if score[label] <= cut]
        start = turn * self.rejected_length
        return below[start : start + self.rejected_length]


@settings
class Uniform(Sampler):
    """Drawn evenly from all ranks below the cut, told in the teacher's order."""

    kind: Literal["uniform"] = "uniform"

    def rejected(
        self, rest: list[str], scores: TeacherScores, chosen: list[str], turn: int, rng: random.Random
    ) -> list[str]:
        picked = set(rng.sample(rest, min(self.rejected_length, len(rest))))
        return [label for label in rest if label in picked]


AnySampler = Annotated[TopBottom | Hard | Margin | Uniform, Field(discriminator="kind")]
