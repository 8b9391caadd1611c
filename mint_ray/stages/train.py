"""Align the student with the pairs: Ray Train workers around the trainer's loop."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray.train
import torch
from pyarrow import fs
from ray.train import Checkpoint, CheckpointUploadMode
from ray.util.placement_group import get_current_placement_group
from ray.util.queue import Queue
from transformers import TrainerCallback, set_seed

from mint_ray import lineage, storage
from mint_ray.artifacts import RUNS, Artifact
from mint_ray.config.stages import Train
from mint_ray.lineage import resolve_student
from mint_ray.runtime.metrics_callback import MetricsCallback
from mint_ray.runtime.train_workers import run_workers
from mint_ray.students.config import Student
from mint_ray.students.loading import load_model, load_tokenizer, load_vision_processor, save_adapter
from mint_ray.telemetry import Progress
from mint_ray.trainers import TrainingRun, build_trainer
from mint_ray.trainers.checkpoints import TRAINER_STATE
from mint_ray.trainers.deepspeed import gathered_parameters
from mint_ray.trainers.examples import StoredExamples

logger = logging.getLogger("mint_ray")

ADAPTER, OUTCOME, TENSORBOARD = "adapter", "outcome.json", "tensorboard"

OnEvaluation = Callable[[str, int, dict[str, Any]], None]
"""Callback: name of the run below `RUNS`, step, metrics by their name in the log (`eval_loss`)."""
GROUP = "placement_group"
"""Additional key of a validation's metrics: hex id of the workers' placement group; not in the stored log."""


def train_student(
    root: str,
    config: Train,
    tokens: Artifact,
    built: Artifact | None = None,
    on_evaluation: OnEvaluation | None = None,
) -> Artifact:
    """Write folder `adapter` (safetensors, tokenizer) of the best checkpoint, and `outcome.json` with the full log.

    An interrupted run resumes from its last checkpoint when the same config is run again, also with another number of
    workers. `built` is the output of `build_vlm` with the student, if it was built. `on_evaluation` is called
    once for each validation, in order of steps, in a thread of this process; also for those of earlier attempts, and
    for all of them at once if the student is already trained.
    """
    artifact = lineage.train(root, config, tokens, built)
    listener = _Listener(artifact.name, on_evaluation)
    if artifact.is_complete:
        if on_evaluation is not None:
            listener.report_evaluations(json.loads(storage.read_bytes(artifact.file_uri(OUTCOME)))["log_history"])
        return artifact
    job = {
        "config": config,
        "student": resolve_student(config.student, built),
        "tokens": tokens,
        "run_name": artifact.name,
    }
    with artifact.write() as draft:
        result = run_workers(train_worker, job, artifact, config.resources, listener.on_message)
        with result.checkpoint.as_directory() as folder:
            outcome = json.loads((Path(folder) / OUTCOME).read_text())
            for name in (ADAPTER, TENSORBOARD):
                if (Path(folder) / name).exists():
                    shutil.copytree(Path(folder) / name, draft.folder / name)
        draft.write_text(OUTCOME, json.dumps(outcome, indent=1))
        draft.counts.update(outcome["counts"])
        draft.metrics.update(outcome["metrics"])
    # the last messages of the workers may have been lost
    listener.report_evaluations(outcome["log_history"])
    storage.delete_folder(storage.join(storage.absolute(root), RUNS, artifact.name))
    logger.info("train: %s", ", ".join(f"{name} {value}" for name, value in outcome["metrics"].items()))
    if config.trainer.kind == "shared_prefix" != outcome["metrics"]["layout"]:
        logger.warning(
            "train: layout concatenated: each prompt ran once per answer; the log of the Ray worker says why"
        )
    return artifact


def train_worker(job: dict[str, Any]) -> None:
    """Train in one worker; rank 0 reports the checkpoints."""
    config: Train = job["config"]
    student: Student = job["student"]
    tokens: Artifact = job["tokens"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    torch.set_num_threads(max(1, int(config.resources.cpus_per_worker)))
    set_seed(config.trainer.seed)
    folder = Path(tempfile.mkdtemp(prefix="mint-ray-"))
    os.environ |= _tracker_variables(folder, job["run_name"])
    try:
        resumed = _resume(folder / "resumed", is_rank_0=rank == 0)
        if resumed is not None and (resumed / OUTCOME).exists():
            return  # an earlier attempt finished and failed before its outcome was published
        vision_processor = load_vision_processor(student)
        tokenizer = vision_processor.tokenizer if vision_processor else load_tokenizer(student)
        model = load_model(student, trainable=True)
        train = StoredExamples.from_artifact(tokens, "train", vision_processor)
        if vision_processor:
            vision_processor.check_features(model, train[0])
        run = TrainingRun(
            model=model,
            tokenizer=tokenizer,
            train=train,
            validation=StoredExamples.from_artifact(tokens, "validation", vision_processor),
            output_dir=folder,
            resources=config.resources,
            run_name=job["run_name"],
            callbacks=[
                Reporter(job["queue"] if rank == 0 else None),
                *([MetricsCallback(job["run_name"])] if rank == 0 else []),
            ],
            resume_from_checkpoint=resumed,
        )
        result = build_trainer(config.trainer).train(run)
        last = folder / "last"
        with gathered_parameters(model, config.resources):
            if rank == 0:
                save_adapter(model, vision_processor.processor if vision_processor else tokenizer, last / ADAPTER)
        if rank == 0:
            _copy_tensorboard(folder, last)
            (last / OUTCOME).write_text(
                json.dumps(
                    {
                        "log_history": result.log_history,
                        "counts": {"records": len(train)},
                        "metrics": {
                            "steps": result.global_step,
                            "best_step": result.best_step,
                            "best_metric": result.best_metric,
                            "tokens": result.train_tokens,
                            "layout": result.layout,
                        },
                    }
                )
            )
        ray.train.report(
            {"step": result.global_step},
            Checkpoint.from_directory(str(last)) if rank == 0 else None,
            checkpoint_dir_name="finished",
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Reporter(TrainerCallback):
    """Callback that reports progress to the driver, and checkpoints to Ray Train, which uploads them meanwhile."""

    def __init__(self, queue: Queue | None) -> None:
        self.queue = queue

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the validations of a resumed run again: the earlier driver may have died before it read them."""
        self._report([row for row in state.log_history if _is_evaluation(row)], state)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """Report a validation."""
        self._report([{**metrics, "step": state.global_step}], state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the step and the last logged loss."""
        if self.queue is not None:
            logged = next((row["loss"] for row in reversed(state.log_history) if "loss" in row), None)
            self.queue.put((state.global_step, state.max_steps, logged, []))

    def _report(self, evaluations: list[dict[str, Any]], state: Any) -> None:
        if self.queue is not None and evaluations:
            group = get_current_placement_group()
            placement = {GROUP: group.id.hex()} if group is not None else {}
            self.queue.put((state.global_step, state.max_steps, None, [row | placement for row in evaluations]))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the checkpoint to Ray Train."""
        checkpoint = None
        if state.is_world_process_zero:
            saved = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            _copy_tensorboard(saved.parent, saved)
            checkpoint = Checkpoint.from_directory(str(saved))
        ray.train.report(
            {"step": state.global_step},
            checkpoint,
            checkpoint_dir_name=f"step-{state.global_step}",
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        )


def _resume(folder: Path, *, is_rank_0: bool) -> Path | None:
    """Copy the last checkpoint of this run to `folder`: all of it for rank 0, the needed files for other workers."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    if is_rank_0:
        checkpoint.to_directory(str(folder))
        if (folder / TENSORBOARD).exists():
            shutil.copytree(folder / TENSORBOARD, folder.parent / TENSORBOARD)
        return folder
    folder.mkdir()
    for name in (TRAINER_STATE, OUTCOME):
        path = f"{checkpoint.path}/{name}"
        if checkpoint.filesystem.get_file_info(path).type == fs.FileType.File:
            with checkpoint.filesystem.open_input_stream(path) as stream:
                (folder / name).write_bytes(stream.read())
    return folder


def _tracker_variables(place: Path, run_name: str) -> dict[str, str]:
    """Return variables with which a resumed run continues its curve in a tracker; those set by the user are kept."""
    wanted = {
        "TENSORBOARD_LOGGING_DIR": str(place / TENSORBOARD),
        "WANDB_RUN_ID": run_name,
        "WANDB_RESUME": "allow",
        "WANDB_DIR": str(place),
    }
    return {name: value for name, value in wanted.items() if name not in os.environ}


def _copy_tensorboard(source: Path, target: Path) -> None:
    if (source / TENSORBOARD).exists():
        shutil.copytree(source / TENSORBOARD, target / TENSORBOARD)


class _Listener:
    """Receiver of the workers' messages; passes each validation on once, also if restarted workers report it again."""

    def __init__(self, run_name: str, on_evaluation: OnEvaluation | None) -> None:
        self.run_name, self.on_evaluation = run_name, on_evaluation
        self.last_step = 0
        self.progress: Progress | None = None

    def on_message(self, step: int, steps: int, loss: float | None, evaluations: list[dict[str, Any]]) -> None:
        self.progress = self.progress or Progress("train", steps, "steps")
        self.progress.update(step, "" if loss is None else f"loss {loss:.3f}")
        self.report_evaluations(evaluations)

    def report_evaluations(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if self.on_evaluation is not None and _is_evaluation(row) and row["step"] > self.last_step:
                self.last_step = int(row["step"])
                self.on_evaluation(self.run_name, self.last_step, row)


def _is_evaluation(row: Mapping[str, Any]) -> bool:
    return "eval_loss" in row
