"""Settings of a run: sections that need each other, and keys of earlier versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mint_ray.config.comparison import ComparisonConfig
from mint_ray.config.loader import UserError, dump, from_data
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.pipeline import check_pipeline
from tests.tiny import save_tiny_student

SPEC: dict[str, Any] = {
    "task": {"kind": "rare_disease"},
    "prepare": {"source": {"kind": "hpo", "num_diseases": 8, "patients_per_disease": 6}},
    "train": {"student": {"model_id": "built"}},
}


def test_a_built_student_and_the_section_that_builds_it_need_each_other() -> None:
    with pytest.raises(UserError, match=r"train\.student\.model_id is 'built', which needs a build_vlm section$"):
        from_data(PipelineConfig, SPEC)
    other = {"student": {"model_id": "bundled:smollm2-135m-instruct"}}
    with pytest.raises(UserError, match=r"must be 'built', got 'bundled:smollm2-135m-instruct'$"):
        from_data(PipelineConfig, SPEC | {"build_vlm": {}, "train": other})
    with pytest.raises(UserError, match="which needs a build_vlm section"):
        from_data(ComparisonConfig, SPEC | {"methods": {"orpo": {}}})
    config = from_data(PipelineConfig, SPEC | {"build_vlm": {"train_batch_size": 4}})
    assert from_data(PipelineConfig, dump(config)) == config


def test_an_old_key_is_an_error_that_names_the_new_one() -> None:
    with pytest.raises(UserError, match=r"^config: join: unknown key .*; did you mean 'build_vlm'\?$"):
        from_data(PipelineConfig, SPEC | {"join": {}, "build_vlm": {}})


def test_settings_of_the_run_are_those_of_a_comparison_without_its_own() -> None:
    spec = SPEC | {"train": {"student": {"model_id": "some/model"}}}
    comparison = from_data(ComparisonConfig, spec | {"methods": {"orpo": {}}})
    assert comparison.pipeline == from_data(PipelineConfig, spec)
    assert type(comparison.pipeline) is PipelineConfig


def test_images_cannot_be_shuffled_if_the_task_shows_none(tmp_path: Path) -> None:
    student = {"student": {"model_id": str(save_tiny_student(tmp_path / "student"))}}
    spec = {"train": student, "pair": {"control": "shuffled"}, "root": str(tmp_path / "out")}
    config = from_data(PipelineConfig, SPEC | spec)
    with pytest.raises(UserError, match=r"^pair\.control: shuffled exchanges the images of the student, but the task"):
        check_pipeline(config)
