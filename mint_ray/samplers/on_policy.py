"""The sampler that rejects what the student itself would answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from mint_ray.config.loader import settings
from mint_ray.records import TeacherScores
from mint_ray.samplers.lists import NOTHING, Knowledge, Sampler, Split, windows


@settings
class OnPolicy(Sampler):
    """What a student gets wrong itself: the labels that it finds likeliest and that are neither chosen nor true.

    Told in the student's order. Where it has fewer of them than a list takes, the ranks just below the teacher's cut
    fill it up, as of `hard`; how many labels did is counted.
    """

    kind: Literal["on_policy"] = "on_policy"
    student: str | None = None
    """Whose answers: null, those of the base student of `train.student`; or the URI of the train artifact of a student
    that was aligned before."""
    within: int = 10
    """The student's so many likeliest labels are its answers."""

    def __post_init__(self) -> None:
        Sampler.__post_init__(self)
        if self.within < 1:
            raise ValueError(f"within must be positive, got {self.within}")

    @property
    def students(self) -> frozenset[str | None]:
        return frozenset({self.student})

    def draw(self, scores: TeacherScores, truth: str | None, knowledge: Knowledge = NOTHING) -> list[Split]:
        if truth in scores.labels[self.top :] and not self.truth_first:
            # a true label is no wrong answer, wherever the teacher has it
            left = [(label, score) for label, score in zip(scores.labels, scores.scores, strict=True) if label != truth]
            scores = dataclasses.replace(
                scores, labels=[label for label, _ in left], scores=[score for _, score in left]
            )
        return Sampler.draw(self, scores, truth, knowledge)

    def rejections(
        self, chosen: list[str], rest: list[str], scores: TeacherScores, knowledge: Knowledge
    ) -> Iterator[list[str]]:
        left = set(rest)
        wrong = [label for label in self._answers(scores.record_id, knowledge) if label in left]
        answered = set(wrong)
        return windows([*wrong, *(label for label in rest if label not in answered)], self.rejected_length)

    def filled(self, record_id: str, rejected: list[str], knowledge: Knowledge) -> int:
        answers = self._answers(record_id, knowledge)
        return sum(label not in answers for label in rejected)

    def _answers(self, record_id: str, knowledge: Knowledge) -> list[str]:
        return knowledge.answers.get(self.student, {}).get(record_id, [])[: self.within]
