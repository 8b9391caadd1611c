"""Settings of a comparison."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from mint_ray.config.loader import settings
from mint_ray.config.parallel import ParallelResources
from mint_ray.config.pipeline import PipelineConfig


@settings
class ComparisonConfig(PipelineConfig):
    """A pipeline, and the methods to compare with the settings in which each differs from that pipeline."""

    methods: dict[str, dict[str, Any]]
    """Name to overrides by dotted path, such as `{train.trainer.objective: {kind: sft}}`. Two more keys: `student:
    base` evaluates the base student under these overrides, and `allow_differences: true` lets a method differ in
    settings that all methods should share."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds of every method: `train.trainer.seed`, and the seed of a sampler that draws at random."""
    metric: Literal["top_1_accuracy", "top_k_accuracy", "mean_reciprocal_rank", "hallucination_free_accuracy"] = (
        "top_1_accuracy"
    )
    """Metric of the paired tests."""
    reference: str | None = None
    """Method that all others are tested against; null: every pair is tested, which takes a larger difference to be
    significant."""
    near_duplicate_threshold: float = 0.95
    """Similarity (cosine of TF-IDF vectors, 0 to 1) to a training or validation note at which a test note is reported
    as a near-duplicate."""
    resources: ParallelResources = ParallelResources()

    renamed_keys: ClassVar[dict[str, str]] = {
        **PipelineConfig.renamed_keys,
        "max_similarity": "near_duplicate_threshold",
    }

    def __post_init__(self) -> None:
        PipelineConfig.__post_init__(self)
        if not self.methods:
            raise ValueError("methods must contain at least one method, got none")
        if any(not name.strip() for name in self.methods):
            raise ValueError("methods: a name must not be empty")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be one or more distinct numbers, got {list(self.seeds)}")
        if self.reference is not None and self.reference not in self.methods:
            raise ValueError(f"reference must be one of {', '.join(self.methods)}, got {self.reference!r}")
        if not 0 < self.near_duplicate_threshold <= 1:
            raise ValueError(
                f"near_duplicate_threshold must be above 0 and at most 1, got {self.near_duplicate_threshold}"
            )
