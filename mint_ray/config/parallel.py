"""Settings of parallel runs, shared by comparisons and sweeps."""

from __future__ import annotations

from mint_ray.config.loader import settings


@settings
class ParallelResources:
    """How work on several students is spread; changes no result."""

    max_concurrent: int = 1
    """Students at a time. What each asks of the cluster stands in the resources of its stages, and nothing is held
    while a stage waits for them, so that they delay each other and never block each other."""

    def __post_init__(self) -> None:
        if self.max_concurrent < 1:
            raise ValueError(f"max_concurrent must be positive, got {self.max_concurrent}")
