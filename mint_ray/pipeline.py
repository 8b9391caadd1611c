"""Run the stages of a config in order; a stage whose output is complete is not run again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from mint_ray import lineage, storage
from mint_ray.artifacts import Artifact, find_artifact
from mint_ray.config.loader import UserError
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.models.pretrained import check_model
from mint_ray.plan import Done, Step, plan_steps
from mint_ray.runtime.goodput import measure_goodput
from mint_ray.sources import build_source
from mint_ray.students.checks import check_images
from mint_ray.tasks import Task, build_task
from mint_ray.teachers import teacher_inputs
from mint_ray.telemetry import heartbeat, record_metric
from mint_ray.trainers import check_trainer

logger = logging.getLogger("mint_ray")

OnEvaluation = Callable[[str, int, dict[str, Any]], None]
"""Callback for validations during training: name of the run below `RUNS`, step, metrics by their name in the log."""

STUDENT_STAGES = {"rank", "tokenize", "train", "choose_passages", "answer", "benchmark"}
"""Stages that load the student or its tokenizer."""


def run_pipeline(config: PipelineConfig, last: str = "report", on_evaluation: OnEvaluation | None = None) -> Done:
    """Run the stage `last` and every stage that it needs; return the outputs by step.

    `on_evaluation` is called for every validation during training, as `train_student` says. Raises UserError for
    invalid input or configuration, before any model is loaded.
    """
    steps = plan_steps(config, last)
    if not all(step.artifact.is_complete for step in steps.values()):
        check_pipeline(config)
        if config.build_vlm is None and any(step.stage in STUDENT_STAGES for step in steps.values()):
            check_images(config.train.student, show_image=build_task(config.task, [], 1).show_image)
        # a model of the Hub is known by its commit once it has been checked
        steps = plan_steps(config, last)
    run = _Run(config, on_evaluation)
    for key, step in steps.items():
        started = time.monotonic()
        with heartbeat(step.stage):
            # validations of a finished training are reported, too
            if not step.artifact.is_complete or (step.stage == "train" and on_evaluation is not None):
                getattr(run, step.stage)(step)
        run.done[key] = step.artifact
        logger.info("%s: %s (%.1f s)", key, step.artifact.uri, time.monotonic() - started)
        _record_goodput(step.artifact)
        if step.stage == "prepare":
            config.pair.sampler.check_num_labels(step.artifact.manifest.counts["labels"])
    return run.done


class _Run:
    """One run of a config: the outputs so far, and a method per stage that writes the output of a step.

    A stage is imported when it runs, because most of them load torch or Ray.
    """

    def __init__(self, config: PipelineConfig, on_evaluation: OnEvaluation | None) -> None:
        self.config, self.on_evaluation = config, on_evaluation
        self.root, self.task, self.resources = config.root, config.task, config.evaluate.resources
        self.done: Done = {}

    @property
    def labelled(self) -> Artifact:
        """Records as the teacher reads them."""
        return self.done.get("match_texts", self.done["prepare"])

    @property
    def records(self) -> Artifact:
        """Records as the student reads them."""
        return self.done.get("shuffle_images", self.labelled)

    @property
    def built(self) -> Artifact | None:
        """Output of `build_vlm`, if the student is built by this run."""
        return self.done.get("build_vlm")

    def prepare(self, step: Step) -> None:
        from mint_ray.stages.prepare import prepare_records

        prepare_records(self.root, self.config.prepare, self.task)

    def embed_texts(self, step: Step) -> None:
        from mint_ray.stages.embed_texts import embed_texts

        embed_texts(self.root, self.config.prepare, self.done["prepare"])

    def match_texts(self, step: Step) -> None:
        from mint_ray.stages.match_texts import match_texts

        match_texts(self.root, self.config.prepare, self.task, self.done["prepare"], self.done["embed_texts"])

    def fit(self, step: Step) -> None:
        from mint_ray.stages.fit import fit_teacher

        fit_teacher(self.root, self.config.fit, self.labelled)

    def score(self, step: Step) -> None:
        from mint_ray.stages.score import score_records

        score_records(self.root, self.config.score, self.task, self.done["fit"], self.labelled)

    def shuffle_images(self, step: Step) -> None:
        from mint_ray.stages.shuffle_images import shuffle_images

        shuffle_images(self.root, self.labelled)

    def build_vlm(self, step: Step) -> None:
        from mint_ray.stages.build_vlm import build_vlm

        build_vlm(self.root, lineage.build_vlm_of(self.config), self.records)

    def rank(self, step: Step) -> None:
        from mint_ray.stages.pair import check_gate
        from mint_ray.stages.rank import rank_labels

        # before a student works for a teacher that is not good enough
        check_gate(self.config.pair.gate, self.done["score"].manifest.metrics["scores"])
        rank_labels(self.root, self.resources, step.details, self.records)

    def pair(self, step: Step) -> None:
        from mint_ray.stages.pair import draw_pairs

        draw_pairs(self.root, self.config.pair, self.task, self.records, self.done["score"], step.details)

    def tokenize(self, step: Step) -> None:
        from mint_ray.stages.tokenize import tokenize_pairs

        tokenize_pairs(self.root, self.config.train, self.done["pair"], self.built)

    def train(self, step: Step) -> None:
        from mint_ray.stages.train import train_student

        train_student(self.root, self.config.train, self.done["tokenize"], self.built, self.on_evaluation)

    def retrieve(self, step: Step) -> None:
        from mint_ray.stages.retrieve import retrieve_documents

        retrieve_documents(self.root, self.config.evaluate, self.task, self.records)

    def choose_passages(self, step: Step) -> None:
        from mint_ray.stages.choose_passages import choose_passages

        choose_passages(self.root, self.config.evaluate, step.details, self.records, self.done["retrieve"])

    def answer(self, step: Step) -> None:
        from mint_ray.stages.answer import answer_records

        answer_records(self.root, self.resources, step.details, self.records)

    def benchmark(self, step: Step) -> None:
        from mint_ray.stages.benchmark import run_harness

        run_harness(self.root, self.config.evaluate, step.details)

    def evaluate(self, step: Step) -> None:
        from mint_ray.stages.evaluate import evaluate_student

        evaluate_student(self.root, self.config.evaluate, self.task, self.config.pair.sampler, step.details)

    def report(self, step: Step) -> None:
        from mint_ray.stages.report import write_report

        write_report(self.config, self.done)


def _record_goodput(artifact: Artifact) -> None:
    """Record what an output has cost for Prometheus: GPU seconds, or CPU seconds if no GPU was allocated."""
    found = measure_goodput(artifact.root, artifact.name)
    unit = "gpu_seconds" if found.allocated.gpu_seconds else "cpu_seconds"
    record_metric("allocated_seconds", getattr(found.allocated, unit), run=artifact.name)
    record_metric("productive_seconds", getattr(found.productive, unit), run=artifact.name)


def check_pipeline(config: PipelineConfig) -> None:
    """Check the inputs, the root and the student, without loading a model.

    Raises:
        UserError: An input is missing, the root cannot be written, or the student cannot be loaded.
    """
    task = build_task(config.task, [], 1)
    _check_records(config, task)
    _check_training(config)
    _check_evaluation(config, task)
    storage.check_writable(config.root)
    if config.build_vlm is None:
        check_model(config.train.student)
        return
    from mint_ray.stages.build_vlm import check_models

    check_models(config.build_vlm)
    if not task.show_image:
        raise UserError("build_vlm: builds a student that takes images, but the task shows none")


def _check_records(config: PipelineConfig, task: Task) -> None:
    build_source(config.prepare.source).inputs()
    if config.prepare.match_texts is not None:
        from mint_ray.stages.match_texts import check_texts

        check_texts(config.prepare.match_texts)
    teacher_inputs(config.fit.teacher)
    for modality in config.score.ablate:
        if modality not in task.modalities:
            raise UserError(f"score.ablate: got {modality!r}; the task has {', '.join(task.modalities)}")
    if config.pair.control == "shuffled" and not task.show_image:
        raise UserError("pair.control: shuffled exchanges the images of the student, but the task shows none")
    if config.task.labels.ids:
        config.pair.sampler.check_num_labels(len(config.task.labels.ids))
    for uri in config.pair.sampler.required_students:
        if uri is not None:
            find_artifact(uri, "train")


def _check_training(config: PipelineConfig) -> None:
    check_trainer(config.train.trainer)
    for tracker in config.train.resources.report_to:
        if find_spec(tracker) is None:
            raise UserError(f"train.resources.report_to: {tracker} is not installed; install the extra `trackers`")


def _check_evaluation(config: PipelineConfig, task: Task) -> None:
    if config.evaluate.retrieval is not None:
        if task.show_image:
            raise UserError("evaluate.retrieval: students that are shown images get no passages")
        from mint_ray.stages.retrieve import check_retrieval

        check_retrieval(config.evaluate.retrieval)
    if config.evaluate.harness is not None:
        from mint_ray.stages.benchmark import check_harness

        check_harness(config.evaluate.harness)
