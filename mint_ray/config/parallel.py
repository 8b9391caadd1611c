"""Settings of parallel runs, shared by comparisons and sweeps."""

from __future__ import annotations

from typing import ClassVar

from mint_ray.config.loader import Resources, settings


@settings
class ParallelResources(Resources):
    """Number of runs at a time; changes no result."""

    max_concurrent: int = 1
    """Maximum number of runs at a time. Each stage of a run requests its own resources and waits until they are free;
    a waiting run keeps nothing allocated, so runs delay but never block each other."""

    renamed_keys: ClassVar[dict[str, str]] = {"concurrent": "max_concurrent"}

    def __post_init__(self) -> None:
        if self.max_concurrent < 1:
            raise ValueError(f"max_concurrent must be positive, got {self.max_concurrent}")
