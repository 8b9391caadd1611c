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

from mint_ray import storage
from mint_ray.artifacts import RUNS, Artifact, open_artifact
from mint_ray.config.loader import dump, from_data
from mint_ray.config.stages import Train
from mint_ray.runtime.metrics_callback import Meter
from mint_ray.runtime.train_workers import run_workers
from mint_ray.students import load_model, load_sight, load_tokenizer, save_adapter, student_revision
from mint_ray.telemetry import Progress
from mint_ray.trainers import build_trainer
from mint_ray.trainers.checkpoints import TRAINER_STATE
from mint_ray.trainers.deepspeed import gathered
from mint_ray.trainers.examples import StoredExamples

logger = logging.getLogger("mint_ray")

ADAPTER, OUTCOME, TENSORBOARD = "adapter", "outcome.json", "tensorboard"

OnEvaluation = Callable[[str, int, dict[str, Any]], None]
"""Takes the name of the run below `RUNS`, the step, and the metrics under their names in the log (`eval_loss`)."""
GROUP = "placement_group"
"""Beside the metrics of a validation: hex id of what Ray holds for the training workers; not in a stored log."""


def train_student(root: str, config: Train, tokens: Artifact, on_evaluation: OnEvaluation | None = None) -> Artifact:
    """Folder `adapter` (safetensors, tokenizer) of the best checkpoint, and `outcome.json` with every logged step.

    A run that was cut off goes on from its last checkpoint when the same config is run again, also on another number
    of workers. `on_evaluation` is called once for each validation, in order of steps, in a thread of this process:
    those of earlier attempts too, all at once where the student is trained already.
    """
    inputs = {"tokens": tokens.name, "student": student_revision(config.student)}
    artifact = open_artifact(root, "train", {"train": dump(config)}, inputs)
    listener = _Listener(artifact.name, on_evaluation)
    if artifact.is_complete:
        if on_evaluation is not None:
            listener.hear_all(json.loads(storage.read_bytes(artifact.file_uri(OUTCOME)))["log_history"])
        return artifact
    job = {"train": dump(config), "tokens": tokens, "run_name": artifact.name}
    with artifact.write() as draft:
        result = run_workers(train_worker, job, artifact, config.resources, listener.hear)
        with result.checkpoint.as_directory() as folder:
            outcome = json.loads((Path(folder) / OUTCOME).read_text())
            for name in (ADAPTER, TENSORBOARD):
                if (Path(folder) / name).exists():
                    shutil.copytree(Path(folder) / name, draft.folder / name)
        draft.write_text(OUTCOME, json.dumps(outcome, indent=1))
        draft.counts.update(outcome["counts"])
        draft.metrics.update(outcome["metrics"])
    # what the last messages of the workers may have missed
    listener.hear_all(outcome["log_history"])
    storage.delete_folder(storage.join(storage.absolute(root), RUNS, artifact.name))
    logger.info("train: %s", ", ".join(f"{name} {value}" for name, value in outcome["metrics"].items()))
    if config.trainer.kind == "shared_prefix" != outcome["metrics"]["layout"]:
        logger.warning("train: prompts ran once for each answer; the log of Ray's worker says why they were not shared")
    return artifact


def train_worker(job: dict[str, Any]) -> None:
    """What one training process does; rank 0 reports the checkpoints."""
    config, tokens = from_data(Train, job["train"]), job["tokens"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    torch.set_num_threads(max(1, int(config.resources.cpus_per_worker)))
    set_seed(config.trainer.seed)
    place = Path(tempfile.mkdtemp(prefix="mint-ray-"))
    os.environ |= _tracker_variables(place, job["run_name"])
    try:
        resumed = _resume(place / "resumed", whole=rank == 0)
        if resumed is not None and (resumed / OUTCOME).exists():
            return  # an earlier attempt finished and died before its outcome was published
        sight = load_sight(config.student)
        tokenizer = sight.tokenizer if sight else load_tokenizer(config.student)
        model = load_model(config.student, trainable=True)
        train = StoredExamples.of(tokens, "train", sight)
        if sight:
            sight.check(model, train[0])
        result = build_trainer(config.trainer).run(
            model=model,
            tokenizer=tokenizer,
            train=train,
            validation=StoredExamples.of(tokens, "validation", sight),
            output_dir=place,
            resources=config.resources,
            run_name=job["run_name"],
            callbacks=[Reporter(job["queue"] if rank == 0 else None), *([Meter(job["run_name"])] if rank == 0 else [])],
            resume_from_checkpoint=resumed,
        )
        last = place / "last"
        with gathered(model, config.resources):
            if rank == 0:
                save_adapter(model, sight.processor if sight else tokenizer, last / ADAPTER)
        if rank == 0:
            _copy_tensorboard(place, last)
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
        shutil.rmtree(place, ignore_errors=True)


class Reporter(TrainerCallback):
    """Tells the driver how far training is, and hands each checkpoint to Ray Train, which uploads it behind it."""

    def __init__(self, queue: Queue | None) -> None:
        self.queue = queue

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # of a run that goes on from a checkpoint: the driver of that time may have died before it was told
        self._tell([row for row in state.log_history if _is_evaluation(row)], state)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        self._tell([{**metrics, "step": state.global_step}], state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.queue is not None:
            logged = next((row["loss"] for row in reversed(state.log_history) if "loss" in row), None)
            self.queue.put((state.global_step, state.max_steps, logged, []))

    def _tell(self, evaluations: list[dict[str, Any]], state: Any) -> None:
        if self.queue is not None and evaluations:
            group = get_current_placement_group()
            held = {GROUP: group.id.hex()} if group is not None else {}
            self.queue.put((state.global_step, state.max_steps, None, [row | held for row in evaluations]))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
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


def _resume(folder: Path, *, whole: bool) -> Path | None:
    """The last checkpoint of this run in a local folder, if there is one: `whole`, or what each worker reads of it."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    if whole:
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
    """A resumed run goes on in the same curve of its tracker; a key set by the user is left alone."""
    wanted = {
        "TENSORBOARD_LOGGING_DIR": str(place / TENSORBOARD),
        "WANDB_RUN_ID": run_name,
        "WANDB_RESUME": "allow",
        "WANDB_DIR": str(place),
    }
    return {name: value for name, value in wanted.items() if name not in os.environ}


def _copy_tensorboard(place: Path, folder: Path) -> None:
    if (place / TENSORBOARD).exists():
        shutil.copytree(place / TENSORBOARD, folder / TENSORBOARD)


class _Listener:
    """Tells progress, and passes validations on, each once, however often workers that began again tell of them."""

    def __init__(self, run_name: str, on_evaluation: OnEvaluation | None) -> None:
        self.run_name, self.on_evaluation = run_name, on_evaluation
        self.last_step = 0
        self.progress: Progress | None = None

    def hear(self, step: int, steps: int, loss: float | None, evaluations: list[dict[str, Any]]) -> None:
        self.progress = self.progress or Progress("train", steps, "steps")
        self.progress.update(step, "" if loss is None else f"loss {loss:.3f}")
        self.hear_all(evaluations)

    def hear_all(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if self.on_evaluation is not None and _is_evaluation(row) and row["step"] > self.last_step:
                self.last_step = int(row["step"])
                self.on_evaluation(self.run_name, self.last_step, row)


def _is_evaluation(row: Mapping[str, Any]) -> bool:
    return "eval_loss" in row
