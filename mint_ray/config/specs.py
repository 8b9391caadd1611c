"""The config class that each command reads a spec as."""

from __future__ import annotations

from mint_ray.config.comparison import ComparisonConfig
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.config.sweep import SweepConfig


def config_class(verb: str) -> type[PipelineConfig]:
    """Return the config class of a command-line verb."""
    return {"compare": ComparisonConfig, "sweep": SweepConfig}.get(verb, PipelineConfig)
