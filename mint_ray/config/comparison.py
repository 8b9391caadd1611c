"""Settings of a comparison."""

from __future__ import annotations

from typing import Any, Literal

from mint_ray.config.loader import settings
from mint_ray.config.parallel import ParallelResources
from mint_ray.config.pipeline import PipelineConfig


@settings
class ComparisonConfig(PipelineConfig):
    """Several methods on equal terms: a run, and for each method the keys in which it differs from that run."""

    methods: dict[str, dict[str, Any]]
    """Name to what the method overrides, such as `{train.trainer.objective: {kind: sft}}`. Two keys more: `student:
    base` judges the base student's answers under these overrides, and `unequal: true` lets a method differ in what
    all should share."""
    seeds: tuple[int, ...] = (0,)
    """Each method is trained once with each: `train.trainer.seed`, and the sampler's where it draws at random."""
    metric: Literal["top_1_accuracy", "top_10_accuracy", "mean_reciprocal_rank", "hallucination_free_accuracy"] = (
        "top_1_accuracy"
    )
    """What the paired tests are about."""
    reference: str | None = None
    """The method that all others are tested against; null tests each against each, which takes a larger difference."""
    max_similarity: float = 0.95
    """Held-out notes at least this like one that was trained on (cosine, 0 to 1) are listed and warned of."""
    resources: ParallelResources = ParallelResources()

    def __post_init__(self) -> None:
        PipelineConfig.__post_init__(self)
        if not self.methods:
            raise ValueError("methods must name at least one method, got none")
        for name in self.methods:
            # the names under which all comparisons show base student and teacher
            if name.startswith(("base student", "teacher")) or not name.strip():
                raise ValueError(f"methods: {name!r} cannot be the name of a method")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different numbers, at least one, got {list(self.seeds)}")
        if self.reference is not None and self.reference not in self.methods:
            raise ValueError(f"reference must be one of {', '.join(self.methods)}, got {self.reference!r}")
        if not 0 < self.max_similarity <= 1:
            raise ValueError(f"max_similarity must lie above 0 and up to 1, got {self.max_similarity}")
