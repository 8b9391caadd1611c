"""Config classes of the commands that read a spec."""

from __future__ import annotations

from mint_ray.config.comparison import ComparisonConfig
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.config.sweep import SweepConfig


def config_class(command: str) -> type[PipelineConfig]:
    """Return the config class that a command of `mint-ray` reads its spec as."""
    return {"compare": ComparisonConfig, "sweep": SweepConfig}.get(command, PipelineConfig)
