"""The whole story: records, teacher, scores, pairs, tokens, student, evaluation, report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from importlib.util import find_spec

from mint_ray import storage
from mint_ray.artifacts import Artifact, find_artifact
from mint_ray.config import PipelineConfig
from mint_ray.loading import UserError, from_data
from mint_ray.sources import build_source
from mint_ray.stages.config import Train
from mint_ray.stages.evaluate import answer_records, evaluate_student
from mint_ray.stages.fit import fit_teacher
from mint_ray.stages.general import check_general
from mint_ray.stages.pair import check_gate, check_lengths, draw_pairs
from mint_ray.stages.prepare import prepare_records
from mint_ray.stages.report import write_report
from mint_ray.stages.retrieval import check_retrieval
from mint_ray.stages.score import score_records
from mint_ray.stages.tokenize import tokenize_pairs
from mint_ray.stages.train import OnEvaluation, train_student
from mint_ray.stages.unpaired import check_texts, pair_texts
from mint_ray.students import check_sight, check_student
from mint_ray.tasks import build_task
from mint_ray.teachers import build_teacher
from mint_ray.trainers import build_trainer

logger = logging.getLogger("mint_ray")

Done = dict[str, Artifact]

STAGES: dict[str, Callable[[PipelineConfig, Done], Artifact]] = {
    "prepare": lambda c, done: pair_texts(c.root, c.prepare, c.task, prepare_records(c.root, c.prepare, c.task)),
    "fit": lambda c, done: fit_teacher(c.root, c.fit, done["prepare"]),
    "score": lambda c, done: score_records(c.root, c.score, c.task, done["fit"], done["prepare"]),
    "pair": lambda c, done: draw_pairs(c.root, c.pair, c.task, done["prepare"], done["score"], ask_students(c, done)),
    "tokenize": lambda c, done: tokenize_pairs(c.root, c.train, done["pair"]),
    "train": lambda c, done: train_student(c.root, c.train, done["tokenize"]),
    "evaluate": lambda c, done: evaluate_student(
        c.root, c.evaluate, c.task, c.pair.sampler, done["prepare"], done["score"], done["train"]
    ),
    "report": lambda c, done: write_report(c.root, c.title, c.task, done),
}

WITHOUT_STUDENT = ("prepare", "fit", "score", "pair")


def run_pipeline(config: PipelineConfig, last: str = "report", on_evaluation: OnEvaluation | None = None) -> Done:
    """Run every stage up to `last` in order; a stage whose artifact is complete is not run again.

    `on_evaluation` is told of every validation during training, as `train_student` says. Raises UserError for what the
    user can mend, before any model is loaded.
    """
    check_pipeline(config)
    # some samplers ask students for their pairs
    if last not in WITHOUT_STUDENT or config.pair.sampler.students:
        check_sight(config.train.student, shows_image=build_task(config.task, [], 1).shows_image)
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


def ask_students(config: PipelineConfig, done: Done) -> dict[str | None, Artifact]:
    """How the students that the sampler asks for rank the labels of the records to train on; none for most samplers."""
    found: dict[str | None, Artifact] = {}
    for uri in sorted(config.pair.sampler.students, key=str):
        # before the student works for a teacher that may not teach
        check_gate(config.pair.gate, done["score"].manifest.metrics["scores"])
        adapter = None if uri is None else find_artifact(uri, "train")
        found[uri] = answer_records(
            config.root,
            config.evaluate,
            config.task,
            config.pair.sampler.top,
            done["prepare"],
            config.train.student if adapter is None else from_data(Train, adapter.manifest.config["train"]).student,
            adapter,
            mode="rank",
            splits=("train", "validation"),
        )
    return found


def check_pipeline(config: PipelineConfig) -> None:
    """Raise UserError if an input is missing, the root cannot be written, or the student is out of reach."""
    build_source(config.prepare.source).inputs()
    if config.prepare.pair_texts is not None:
        check_texts(config.prepare.pair_texts)
    build_teacher(config.fit.teacher).inputs()
    modalities = build_task(config.task, [], 1).modalities
    for modality in config.score.without:
        if modality not in modalities:
            raise UserError(f"score.without: got {modality!r}; the task has {', '.join(modalities)}")
    if config.task.labels.ids:
        check_lengths(config.pair, len(config.task.labels.ids))
    for uri in config.pair.sampler.students:
        if uri is not None:
            find_artifact(uri, "train")
    build_trainer(config.train.trainer)
    for tracker in config.train.resources.report_to:
        if find_spec(tracker) is None:
            raise UserError(f"train.resources.report_to: {tracker} is not installed; the extra `trackers` brings it")
    if config.evaluate.retrieval is not None:
        if build_task(config.task, [], 1).shows_image:
            raise UserError("evaluate.retrieval: a student that is shown images is given no passages")
        check_retrieval(config.evaluate.retrieval)
    if config.evaluate.general is not None:
        check_general(config.evaluate.general)
    storage.check_writable(config.root)
    check_student(config.train.student)
