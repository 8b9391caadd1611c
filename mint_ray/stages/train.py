"""Align the student with the pairs: Ray Train workers around the trainer's loop."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.train
import torch
from pyarrow import fs
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointUploadMode,
    FailureConfig,
    RunConfig,
    ScalingConfig,
)
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.placement_group import get_current_placement_group
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from transformers import TrainerCallback, set_seed

from mint_ray import storage
from mint_ray.artifacts import RUNS, Artifact, open_artifact
from mint_ray.loading import UserError, dump, from_data
from mint_ray.stages.config import Train
from mint_ray.stages.session import connect
from mint_ray.students import load_model, load_tokenizer, save_adapter, student_revision
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
    connect()
    with artifact.write() as draft, _progress(listener) as queue:
        filesystem, place = storage.resolve(storage.join(storage.absolute(root), RUNS))
        resources = config.resources
        result = _fit(
            TorchTrainer(
                train_worker,
                train_loop_config={
                    "train": dump(config),
                    "tokens": tokens,
                    "run_name": artifact.name,
                    "queue": queue,
                },
                scaling_config=ScalingConfig(
                    num_workers=resources.num_workers,
                    use_gpu=resources.gpus_per_worker > 0,
                    resources_per_worker={"CPU": resources.cpus_per_worker}
                    | ({"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}),
                ),
                run_config=RunConfig(
                    name=artifact.name,
                    storage_path=place,
                    storage_filesystem=filesystem,
                    failure_config=FailureConfig(max_failures=resources.max_failures),
                    checkpoint_config=CheckpointConfig(num_to_keep=1),
                ),
            )
        )
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
    return artifact


def _fit(trainer: TorchTrainer) -> Any:
    try:
        return trainer.fit()
    except TrainingFailedError as failure:
        for error in getattr(failure, "worker_failures", {}).values():
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, UserError):
                    raise UserError(str(cause)) from failure
                cause = cause.__cause__
        raise


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
        tokenizer = load_tokenizer(config.student)
        model = load_model(config.student, trainable=True)
        train = StoredExamples.of(tokens, "train")
        result = build_trainer(config.trainer).run(
            model=model,
            tokenizer=tokenizer,
            train=train,
            validation=StoredExamples.of(tokens, "validation"),
            output_dir=place,
            resources=config.resources,
            run_name=job["run_name"],
            callbacks=[Reporter(job["queue"] if rank == 0 else None)],
            resume_from_checkpoint=resumed,
        )
        last = place / "last"
        with gathered(model, config.resources):
            if rank == 0:
                save_adapter(model, tokenizer, last / ADAPTER)
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
    """Passes validations on, each once, however often workers that were started again tell of them."""

    def __init__(self, run_name: str, on_evaluation: OnEvaluation | None) -> None:
        self.run_name, self.on_evaluation = run_name, on_evaluation
        self.last_step = 0

    def hear_all(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if self.on_evaluation is not None and _is_evaluation(row) and row["step"] > self.last_step:
                self.last_step = int(row["step"])
                self.on_evaluation(self.run_name, self.last_step, row)


def _is_evaluation(row: Mapping[str, Any]) -> bool:
    return "eval_loss" in row


@contextmanager
def _progress(listener: _Listener) -> Iterator[Queue]:
    """A queue that workers fill with (step, steps, loss, validations), told by a thread of the driver.

    Raises what the listener raised.
    """
    # beside the driver, so that no machine of the workers takes it along when it is lost
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue, done = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here}), threading.Event()
    raised: list[Exception] = []

    def tell() -> None:
        progress: Progress | None = None
        while not done.is_set():
            try:
                step, steps, loss, evaluations = queue.get(timeout=1.0)
            except Empty:
                continue
            progress = progress or Progress("train", steps, "steps")
            progress.reach(step, "" if loss is None else f"loss {loss:.3f}")
            if not raised:
                try:
                    listener.hear_all(evaluations)
                except Exception as error:
                    raised.append(error)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        done.set()
        thread.join()
        queue.shutdown()
    if raised:
        raise raised[0]
