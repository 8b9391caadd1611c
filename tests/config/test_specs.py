"""Config class of each command."""

from __future__ import annotations

import pytest

from mint_ray.config.comparison import ComparisonConfig
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.config.specs import config_class
from mint_ray.config.sweep import SweepConfig


@pytest.mark.parametrize(
    ("command", "expected"),
    [("compare", ComparisonConfig), ("sweep", SweepConfig), ("run", PipelineConfig), ("evaluate", PipelineConfig)],
)
def test_a_command_reads_its_config_class(command: str, expected: type[PipelineConfig]) -> None:
    assert config_class(command) is expected
