"""Settings of a comparison: validation, renamed keys, and the pipeline without the methods."""

from __future__ import annotations

from typing import Any

import pytest

from mint_ray.config.comparison import ComparisonConfig
from mint_ray.config.loader import UserError, from_data
from mint_ray.config.pipeline import PipelineConfig
from tests.config.test_sweep import BASE


def config(**comparison: Any) -> ComparisonConfig:
    return from_data(ComparisonConfig, {**BASE, "methods": {"m": {}}, **comparison})


def test_the_pipeline_is_the_config_without_the_methods() -> None:
    pipeline = config().pipeline
    assert type(pipeline) is PipelineConfig
    assert pipeline == from_data(PipelineConfig, BASE)


@pytest.mark.parametrize(
    ("comparison", "message"),
    [
        ({"methods": {}}, "methods must contain at least one method, got none"),
        ({"methods": {" ": {}}}, "methods: a name must not be empty"),
        ({"seeds": [1, 1]}, r"seeds must be one or more distinct numbers, got \[1, 1\]"),
        ({"seeds": []}, r"seeds must be one or more distinct numbers, got \[\]"),
        ({"reference": "n"}, "reference must be one of m, got 'n'"),
        ({"near_duplicate_threshold": 1.5}, "near_duplicate_threshold must be above 0 and at most 1, got 1.5"),
        ({"max_similarity": 0.9}, "max_similarity: .* did you mean 'near_duplicate_threshold'"),
        ({"resources": {"concurrent": 2}}, r"resources\.concurrent: .* did you mean 'max_concurrent'"),
        ({"join": {}}, "join: .* did you mean 'build_vlm'"),
    ],
)
def test_an_invalid_comparison_is_an_error(comparison: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**comparison)
