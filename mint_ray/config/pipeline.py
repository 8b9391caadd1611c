"""The whole of a run as one config; importing it loads nothing heavy."""

from __future__ import annotations

from mint_ray.config.loader import settings
from mint_ray.config.stages import Evaluate, Fit, Join, Pair, Prepare, Score, Train
from mint_ray.tasks.config import AnyTask

JOINED = "joined"
"""As `train.student.model_id`: the student that `join` makes."""


@settings
class PipelineConfig:
    """One run: what is asked, who teaches, how pairs are drawn, who learns, how it is judged."""

    root: str = "out"
    """Where artifacts go: a folder, `s3://bucket/prefix` or `gs://bucket/prefix`."""
    title: str = "mint_ray run"
    """Heading of the report."""
    task: AnyTask
    prepare: Prepare
    fit: Fit = Fit()
    score: Score = Score()
    pair: Pair = Pair()
    join: Join | None = None
    """Make the student out of parts; `train.student.model_id` is then `joined`. null: it is one that there is."""
    train: Train
    evaluate: Evaluate = Evaluate()

    def __post_init__(self) -> None:
        model_id = self.train.student.model_id
        if self.join is not None and model_id != JOINED:
            raise ValueError(f"join makes a student, so train.student.model_id must be {JOINED!r}, got {model_id!r}")
        if self.join is None and model_id == JOINED:
            raise ValueError(f"train.student.model_id is {JOINED!r}, so a section join must say of what")
