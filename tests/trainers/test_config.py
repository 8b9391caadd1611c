"""Settings are validated with the name of the key, and old keys and values name the new ones."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from mint_ray.config.loader import UserError, from_data
from mint_ray.trainers.config import TrainerArguments, TrainResources


@pytest.mark.parametrize(
    ("cls", "key", "value"),
    [
        (TrainerArguments, "learning_rate", 0.0),
        (TrainerArguments, "warmup_ratio", 1.0),
        (TrainerArguments, "eval_steps", 2.5),
        (TrainerArguments, "max_steps", 0),
        (TrainerArguments, "logging_steps", 0),
        (TrainerArguments, "weight_decay", -1.0),
        (TrainResources, "num_workers", 0),
        (TrainResources, "max_tokens_per_row", 0),
    ],
)
def test_an_invalid_value_raises_an_error_with_its_name(cls: type[Any], key: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{key} must .* got {value}"):
        from_data(cls, {key: value})


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({"offload": "optimizer"}, "offload optimizer needs zero_stage 1, 2 or 3, got None"),
        ({"zero_stage": 0, "offload": "optimizer"}, "offload optimizer needs zero_stage 1, 2 or 3, got 0"),
        ({"zero_stage": 2, "offload": "parameters"}, "offload parameters needs zero_stage 3, got 2"),
        (
            {"zero_stage": 3, "torch_compile": True},
            "torch_compile does not support the sharded weights of zero_stage 3",
        ),
        ({"num_workers": [4, 2]}, r"num_workers must be positive or \[min, max\], got \(4, 2\)"),
    ],
)
def test_settings_that_exclude_each_other_raise_an_error(resources: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        from_data(TrainResources, resources)


def test_an_old_key_names_the_new_one() -> None:
    with pytest.raises(UserError, match=r"row_tokens: unknown key .* did you mean 'max_tokens_per_row'"):
        from_data(TrainResources, {"row_tokens": 4096})


def test_the_old_value_of_overlong_names_the_new_one() -> None:
    with pytest.raises(UserError, match="overlong: input should be 'drop' or 'truncate', got 'cut'"):
        from_data(TrainerArguments, {"overlong": "cut"})


@pytest.mark.parametrize(("num_workers", "expected"), [(3, (3, 3)), ([2, 8], (2, 8))])
def test_the_worker_range_has_a_minimum_and_a_maximum(num_workers: Any, expected: tuple[int, int]) -> None:
    assert from_data(TrainResources, {"num_workers": num_workers}).worker_range == expected


def test_settings_import_no_heavy_package() -> None:
    code = """
import sys, mint_ray.trainers, mint_ray.trainers.config, mint_ray.objectives, mint_ray.layouts
print({'torch', 'transformers', 'numpy', 'ray'} & set(sys.modules))
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"
