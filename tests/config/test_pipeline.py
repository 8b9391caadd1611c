"""What the root of a config demands of its sections together."""

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
    "prepare": {"source": {"kind": "hpo", "diseases": 8, "patients_per_disease": 6}},
    "train": {"student": {"model_id": "joined"}},
}


def test_a_joined_student_and_what_it_is_joined_of_go_together() -> None:
    with pytest.raises(UserError, match=r"train\.student\.model_id is 'joined', so a section join must say of what"):
        from_data(PipelineConfig, SPEC)
    with pytest.raises(UserError, match="must be 'joined', got 'bundled:smollm2-135m-instruct'"):
        student = {"student": {"model_id": "bundled:smollm2-135m-instruct"}}
        from_data(PipelineConfig, SPEC | {"join": {}, "train": student})
    with pytest.raises(UserError, match="so a section join must say of what"):
        from_data(ComparisonConfig, SPEC | {"methods": {"orpo": {}}})
    made = from_data(PipelineConfig, SPEC | {"join": {"train_batch_size": 4}})
    assert from_data(PipelineConfig, dump(made)) == made


def test_images_are_not_shuffled_for_a_student_that_sees_none(tmp_path: Path) -> None:
    student = {"student": {"model_id": str(save_tiny_student(tmp_path / "student"))}}
    config = from_data(
        PipelineConfig,
        SPEC | {"train": student, "pair": {"control": "shuffled"}, "root": str(tmp_path / "out")},
    )
    with pytest.raises(UserError, match=r"pair\.control: shuffled exchanges the images that the student sees"):
        check_pipeline(config)
