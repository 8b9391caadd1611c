"""A sampler that rejects the student's own wrong answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Literal

from mint_ray.config.loader import settings
from mint_ray.records import TeacherScores
from mint_ray.samplers.base import EMPTY_CONTEXT, ChosenRejected, Sampler, SamplerContext, chunks


@settings
class OnPolicy(Sampler):
    """Sampler of the labels that a student itself finds most likely and that are neither chosen nor true.

    They are listed in the student's order. If there are too few, the ranks just below the chosen ones fill up the list,
    as for `hard`; the number of labels filled up is counted.
    """

    renamed_keys: ClassVar[dict[str, str]] = {"within": "student_top_k"}

    kind: Literal["on_policy"] = "on_policy"
    student: str | None = None
    """URI of the train artifact of the student; null: the base student of `train.student`."""
    student_top_k: int = 10
    """Number of the student's most likely labels that count as its answers."""

    def __post_init__(self) -> None:
        Sampler.__post_init__(self)
        if self.student_top_k < 1:
            raise ValueError(f"student_top_k must be positive, got {self.student_top_k}")

    @property
    def required_students(self) -> frozenset[str | None]:
        """Students whose rankings must be in the context: the one of the settings."""
        return frozenset({self.student})

    def draw(
        self, scores: TeacherScores, truth: str | None, context: SamplerContext = EMPTY_CONTEXT
    ) -> list[ChosenRejected]:
        """Return pairs as `Sampler.draw` does, without the true label among the rejected ones."""
        if truth in scores.labels[self.top :] and not self.truth_first:
            kept = [(label, score) for label, score in zip(scores.labels, scores.scores, strict=True) if label != truth]
            scores = dataclasses.replace(
                scores, labels=[label for label, _ in kept], scores=[score for _, score in kept]
            )
        return Sampler.draw(self, scores, truth, context)

    def iter_rejected(
        self, chosen: list[str], remaining: list[str], scores: TeacherScores, context: SamplerContext
    ) -> Iterator[list[str]]:
        """Yield the student's most likely wrong labels, then the ones after them, filled up by the teacher's ranks."""
        available = set(remaining)
        wrong = [label for label in self._answers(scores.record_id, context) if label in available]
        answered = set(wrong)
        return chunks([*wrong, *(label for label in remaining if label not in answered)], self.num_rejected)

    def count_fallbacks(self, record_id: str, rejected: list[str], context: SamplerContext) -> int:
        """Return the number of rejected labels that the student did not answer."""
        answers = self._answers(record_id, context)
        return sum(label not in answers for label in rejected)

    def _answers(self, record_id: str, context: SamplerContext) -> list[str]:
        return context.student_rankings.get(self.student, {}).get(record_id, [])[: self.student_top_k]
