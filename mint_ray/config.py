"""The whole of a run as one config; importing it loads nothing heavy."""

from __future__ import annotations

from mint_ray.loading import settings
from mint_ray.stages.config import Evaluate, Fit, Pair, Prepare, Score, Train
from mint_ray.tasks.config import AnyTask


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
    train: Train
    evaluate: Evaluate = Evaluate()
