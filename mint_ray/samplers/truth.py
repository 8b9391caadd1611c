"""A sampler that uses the known true label and no teacher."""

from __future__ import annotations

from typing import Literal

from mint_ray.config.loader import settings
from mint_ray.records import TeacherScores
from mint_ray.samplers.base import EMPTY_CONTEXT, ChosenRejected, Sampler, SamplerContext


@settings
class Truth(Sampler):
    """Baseline without a teacher: the known true label, to measure the benefit of the teacher's ranking.

    `chosen` is the true label followed by labels drawn uniformly from the others, so that lists have the usual length;
    `rejected` is drawn from the remaining ones. A record without a known label gives no pair.
    """

    kind: Literal["truth"] = "truth"

    @property
    def is_random(self) -> bool:
        """True: labels are drawn."""
        return True

    def draw(
        self, scores: TeacherScores, truth: str | None, context: SamplerContext = EMPTY_CONTEXT
    ) -> list[ChosenRejected]:
        """Return pairs with the true label first in `chosen`; none without a known label or with too few labels."""
        if truth is None or len(scores.labels) < self.min_labels:
            return []
        rng = self.record_rng(scores.record_id)
        # sorted by id: the draw must not depend on the teacher's order
        others = sorted(label for label in scores.labels if label != truth)
        fillers = rng.sample(others, self.top - 1)
        chosen, remaining = [truth, *fillers], [label for label in others if label not in fillers]
        pairs: list[ChosenRejected] = []
        for _ in range(self.pairs_per_record):
            rejected = rng.sample(remaining, self.num_rejected)
            if (chosen, rejected) not in pairs:
                pairs.append((chosen, rejected))
        return pairs
