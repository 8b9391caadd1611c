"""The whole story: records, teacher, scores, pairs, tokens, student, evaluation, report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from importlib.util import find_spec

from mint_ray import storage
from mint_ray.artifacts import Artifact
from mint_ray.config import PipelineConfig
from mint_ray.loading import UserError
from mint_ray.sources import build_source
from mint_ray.stages.evaluate import evaluate_student
from mint_ray.stages.fit import fit_teacher
from mint_ray.stages.pair import check_lengths, draw_pairs
from mint_ray.stages.prepare import prepare_records
from mint_ray.stages.report import write_report
from mint_ray.stages.score import score_records
from mint_ray.stages.tokenize import tokenize_pairs
from mint_ray.stages.train import OnEvaluation, train_student
from mint_ray.students import check_student
from mint_ray.tasks import build_task
from mint_ray.teachers import build_teacher
from mint_ray.trainers import build_trainer

logger = logging.getLogger("mint_ray")

Done = dict[str, Artifact]

STAGES: dict[str, Callable[[PipelineConfig, Done], Artifact]] = {
    "prepare": lambda c, done: prepare_records(c.root, c.prepare, c.task),
    "fit": lambda c, done: fit_teacher(c.root, c.fit, done["prepare"]),
    "score": lambda c, done: score_records(c.root, c.score, c.task, done["fit"], done["prepare"]),
    "pair": lambda c, done: draw_pairs(c.root, c.pair, c.task, done["prepare"], done["score"]),
    "tokenize": lambda c, done: tokenize_pairs(c.root, c.train, done["pair"]),
    "train": lambda c, done: train_student(c.root, c.train, done["tokenize"]),
    "evaluate": lambda c, done: evaluate_student(
        c.root, c.evaluate, c.task, c.pair.sampler, done["prepare"], done["score"], done["train"]
    ),
    "report": lambda c, done: write_report(c.root, c.title, c.task, done),
}


def run_pipeline(config: PipelineConfig, last: str = "report", on_evaluation: OnEvaluation | None = None) -> Done:
    """Run every stage up to `last` in order; a stage whose artifact is complete is not run again.

    `on_evaluation` is told of every validation during training, as `train_student` says. Raises UserError for what the
    user can mend, before any model is loaded.
    """
    check_pipeline(config)
    done: Done = {}
    stages = STAGES | {"train": lambda c, done: train_student(c.root, c.train, done["tokenize"], on_evaluation)}
    for stage, run in stages.items():
        started = time.monotonic()
        done[stage] = run(config, done)
        logger.info("%s: %s (%.1f s)", stage, done[stage].uri, time.monotonic() - started)
        if stage == "prepare":
            check_lengths(config.pair, done["prepare"].manifest.counts["labels"])
        if stage == last:
            break
    return done


def check_pipeline(config: PipelineConfig) -> None:
    """Raise UserError if an input is missing, the root cannot be written, or the student is out of reach."""
    build_source(config.prepare.source).inputs()
    build_teacher(config.fit.teacher).inputs()
    modalities = build_task(config.task, [], 1).modalities
    for modality in config.score.without:
        if modality not in modalities:
            raise UserError(f"score.without: got {modality!r}; the task has {', '.join(modalities)}")
    if config.task.labels.ids:
        check_lengths(config.pair, len(config.task.labels.ids))
    build_trainer(config.train.trainer)
    for tracker in config.train.resources.report_to:
        if find_spec(tracker) is None:
            raise UserError(f"train.resources.report_to: {tracker} is not installed; the extra `trackers` brings it")
    storage.check_writable(config.root)
    check_student(config.train.student)
