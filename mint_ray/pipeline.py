"""The whole story: records, teacher, scores, pairs, tokens, student, evaluation, report."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from importlib.util import find_spec

from mint_ray import storage
from mint_ray.artifacts import Artifact, find_artifact
from mint_ray.config.loader import UserError, from_data
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.config.stages import Train
from mint_ray.runtime.goodput import measure_goodput
from mint_ray.sources import build_source
from mint_ray.stages.benchmark import check_general
from mint_ray.stages.build_vlm import STUDENT, check_parts, join_student
from mint_ray.stages.evaluate import answer_records, evaluate_student
from mint_ray.stages.fit import fit_teacher
from mint_ray.stages.match_texts import check_texts, pair_texts
from mint_ray.stages.pair import check_gate, check_lengths, draw_pairs
from mint_ray.stages.prepare import prepare_records
from mint_ray.stages.report import write_report
from mint_ray.stages.retrieve import check_retrieval
from mint_ray.stages.score import score_records
from mint_ray.stages.shuffle_images import shuffle_images
from mint_ray.stages.tokenize import tokenize_pairs
from mint_ray.stages.train import OnEvaluation, train_student
from mint_ray.students import check_sight, check_student
from mint_ray.tasks import build_task
from mint_ray.teachers import build_teacher
from mint_ray.telemetry import record_metric, heartbeat
from mint_ray.trainers import build_trainer

logger = logging.getLogger("mint_ray")

Done = dict[str, Artifact]

STAGES: dict[str, Callable[[PipelineConfig, Done], Artifact]] = {
    "prepare": lambda c, done: pair_texts(c.root, c.prepare, c.task, prepare_records(c.root, c.prepare, c.task)),
    "fit": lambda c, done: fit_teacher(c.root, c.fit, done["prepare"]),
    "score": lambda c, done: score_records(c.root, c.score, c.task, done["fit"], done["prepare"]),
    "shuffle": lambda c, done: shuffle_images(c.root, done["prepare"]),
    "pair": lambda c, done: draw_pairs(c.root, c.pair, c.task, shown(done), done["score"], ask_students(c, done)),
    "join": lambda c, done: join(c, done),
    "tokenize": lambda c, done: tokenize_pairs(c.root, taught(c, done), done["pair"]),
    "train": lambda c, done: train_student(c.root, taught(c, done), done["tokenize"]),
    "evaluate": lambda c, done: evaluate_student(
        c.root, c.evaluate, c.task, c.pair.sampler, shown(done), done["score"], done["train"]
    ),
    "report": lambda c, done: write_report(c.root, c.title, c.task, done),
}

WITHOUT_STUDENT = ("prepare", "fit", "score", "shuffle", "pair", "join")


def run_pipeline(config: PipelineConfig, last: str = "report", on_evaluation: OnEvaluation | None = None) -> Done:
    """Run every stage up to `last` in order; a stage whose artifact is complete is not run again.

    `on_evaluation` is told of every validation during training, as `train_student` says. Raises UserError for what the
    user can mend, before any model is loaded.
    """
    check_pipeline(config)
    if last == "join" and config.join is None:
        raise UserError("join: the spec has no such section; its student is one that there is")
    # some samplers ask students for their pairs
    if config.join is None and (last not in WITHOUT_STUDENT or config.pair.sampler.students):
        check_sight(config.train.student, shows_image=build_task(config.task, [], 1).shows_image)
    done: Done = {}
    stages = STAGES | {"train": lambda c, done: train_student(c.root, taught(c, done), done["tokenize"], on_evaluation)}
    for stage in left_out(config):
        del stages[stage]
    for stage, run in stages.items():
        started = time.monotonic()
        with heartbeat(stage):
            done[stage] = run(config, done)
        logger.info("%s: %s (%.1f s)", stage, done[stage].uri, time.monotonic() - started)
        tell_spent(done[stage])
        if stage == "prepare":
            check_lengths(config.pair, done["prepare"].manifest.counts["labels"])
        if stage == last:
            break
    return done


def left_out(config: PipelineConfig) -> list[str]:
    """The stages that a run takes only if its spec asks for them, and this one does not."""
    wanted = {"shuffle": config.pair.control == "shuffled", "join": config.join is not None}
    return [stage for stage, is_wanted in wanted.items() if not is_wanted]


def shown(done: Done) -> Artifact:
    """The records as the student sees them."""
    return done.get("shuffle", done["prepare"])


def join(config: PipelineConfig, done: Done) -> Artifact:
    """The student that the section `join` makes."""
    if config.join is None:
        raise ValueError("this run joins no student")
    return join_student(config.root, config.join, shown(done))


def taught(config: PipelineConfig, done: Done) -> Train:
    """Who learns, and how, for the stages: where the student is `joined`, with the folder that holds it by now."""
    if config.join is None:
        return config.train
    folder = join(config, done).file_uri(STUDENT)
    return dataclasses.replace(config.train, student=dataclasses.replace(config.train.student, model_id=folder))


def tell_spent(artifact: Artifact) -> None:
    """Tell Prometheus what an artifact has cost: of GPUs, or of processors where no GPU was held."""
    spent = measure_goodput(artifact.root, artifact.name)
    held = "gpu_seconds" if spent.rented.gpu_seconds else "cpu_seconds"
    record_metric("allocated_seconds", getattr(spent.rented, held), run=artifact.name)
    record_metric("productive_seconds", getattr(spent.work, held), run=artifact.name)


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
            shown(done),
            taught(config, done).student
            if adapter is None
            else from_data(Train, adapter.manifest.config["train"]).student,
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
    asked = build_task(config.task, [], 1)
    for modality in config.score.without:
        if modality not in asked.modalities:
            raise UserError(f"score.without: got {modality!r}; the task has {', '.join(asked.modalities)}")
    if config.pair.control == "shuffled" and not asked.shows_image:
        raise UserError("pair.control: shuffled exchanges the images that the student sees, and it sees none")
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
        if asked.shows_image:
            raise UserError("evaluate.retrieval: a student that is shown images is given no passages")
        check_retrieval(config.evaluate.retrieval)
    if config.evaluate.general is not None:
        check_general(config.evaluate.general)
    storage.check_writable(config.root)
    if config.join is None:
        check_student(config.train.student)
    else:
        check_parts(config.join)
        if not asked.shows_image:
            raise UserError("join: makes a student that sees images, and the task shows none")
