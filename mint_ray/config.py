"""The whole of a run as one config; importing it loads nothing heavy."""

from __future__ import annotations

from mint_ray.loading import dump, from_data, settings
from mint_ray.search import Sweep
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


@settings
class SweepConfig(PipelineConfig):
    """A run and what may vary in it; what the spec itself says is the default that the sweep is measured against."""

    sweep: Sweep

    @property
    def pipeline(self) -> PipelineConfig:
        """The run without its sweep."""
        return from_data(PipelineConfig, {key: value for key, value in dump(self).items() if key != "sweep"})
