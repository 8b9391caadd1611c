"""Settings of one run; importing this module loads nothing heavy."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from mint_ray.config.loader import settings
from mint_ray.config.stages import BuildVlm, Evaluate, Fit, Pair, Prepare, Score, Train
from mint_ray.tasks.config import AnyTask

BUILT = "built"
"""Value of `train.student.model_id` for the student that `build_vlm` builds."""


@settings
class PipelineConfig:
    """One run: the task, the teacher, the pairs, the student and its evaluation."""

    root: str = "out"
    """Place of the artifacts: a folder, `s3://bucket/prefix` or `gs://bucket/prefix`."""
    title: str = "mint_ray run"
    """Heading of the report."""
    task: AnyTask
    prepare: Prepare
    fit: Fit = Fit()
    score: Score = Score()
    pair: Pair = Pair()
    build_vlm: BuildVlm | None = None
    """Vision-language student to build from an encoder and a language model; `train.student.model_id` is then `built`.
    null: the student is an existing model."""
    train: Train
    evaluate: Evaluate = Evaluate()

    renamed_keys: ClassVar[dict[str, str]] = {"join": "build_vlm"}

    def __post_init__(self) -> None:
        model_id = self.train.student.model_id
        if self.build_vlm is not None and model_id != BUILT:
            raise ValueError(f"with a build_vlm section train.student.model_id must be {BUILT!r}, got {model_id!r}")
        if self.build_vlm is None and model_id == BUILT:
            raise ValueError(f"train.student.model_id is {BUILT!r}, which needs a build_vlm section")

    @property
    def pipeline(self) -> PipelineConfig:
        """Settings of the run alone, without those that a comparison or a sweep adds."""
        return PipelineConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(PipelineConfig)})
