"""Align the student with the pairs: Ray Train workers around the trainer's loop."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchTrainer
from ray.util.queue import Empty, Queue
from transformers import TrainerCallback, set_seed

from mint_ray import storage
from mint_ray.artifacts import Artifact, open_artifact
from mint_ray.loading import dump, from_data
from mint_ray.records import PreferencePair
from mint_ray.stages.config import Train
from mint_ray.stages.session import connect
from mint_ray.students import load_model, load_tokenizer, save_adapter, student_revision
from mint_ray.telemetry import Progress
from mint_ray.trainers import build_trainer
from mint_ray.trainers.deepspeed import gathered

logger = logging.getLogger("mint_ray")

RUNS = "runs"
"""Folder below the root for checkpoints of training that has not finished; emptied when it has."""
ADAPTER, OUTCOME = "adapter", "outcome.json"


def train_student(root: str, config: Train, pairs: Artifact) -> Artifact:
    """Folder `adapter` (safetensors, tokenizer) of the best checkpoint, and `outcome.json` with every logged step.

    A run that was cut off goes on from its last checkpoint when the same config is run again.
    """
    inputs = {"pairs": pairs.name, "student": student_revision(config.student)}
    artifact = open_artifact(root, "train", {"train": dump(config)}, inputs)
    if artifact.is_complete:
        return artifact
    connect()
    with artifact.write() as draft, _progress() as queue:
        filesystem, place = storage.resolve(storage.join(storage.absolute(root), RUNS))
        resources = config.resources
        result = TorchTrainer(
            train_worker,
            train_loop_config={"train": dump(config), "pairs": pairs, "queue": queue},
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
        ).fit()
        with result.checkpoint.as_directory() as folder:
            outcome = json.loads((Path(folder) / OUTCOME).read_text())
            for path in sorted((Path(folder) / ADAPTER).iterdir()):
                (draft.folder / ADAPTER).mkdir(exist_ok=True)
                (draft.folder / ADAPTER / path.name).write_bytes(path.read_bytes())
        draft.write_text(OUTCOME, json.dumps(outcome, indent=1))
        draft.counts.update(outcome["counts"])
        draft.dropped.update(outcome["dropped"])
        draft.metrics.update(outcome["metrics"])
    storage.delete_folder(storage.join(storage.absolute(root), RUNS, artifact.name))
    logger.info("train: %s", ", ".join(f"{name} {value}" for name, value in outcome["metrics"].items()))
    return artifact


def train_worker(job: dict[str, Any]) -> None:
    """What one training process does; rank 0 reports the checkpoints."""
    config, pairs = from_data(Train, job["train"]), job["pairs"]
    rank = ray.train.get_context().get_world_rank()
    torch.set_num_threads(max(1, int(config.resources.cpus_per_worker)))
    set_seed(config.trainer.seed)
    tokenizer = load_tokenizer(config.student)
    trainer = build_trainer(config.trainer)
    train, dropped = trainer.tokenize(pairs.rows(PreferencePair, "train"), tokenizer)
    validation, too = trainer.tokenize(pairs.rows(PreferencePair, "validation"), tokenizer)
    dropped |= {f"validation: {reason}": count for reason, count in too.items()}
    if not train:
        raise ValueError(f"no pair fits in train.trainer.max_length {config.trainer.max_length}")
    model = load_model(config.student, trainable=True)
    # one folder for all workers of a machine: each looks there for the best checkpoint, which only one has written
    place = Path(tempfile.gettempdir()) / broadcast_from_rank_zero(f"mint-ray-{uuid.uuid4().hex}")
    try:
        resumed = _resume(place / f"resume-{rank}")
        if resumed and (Path(resumed) / OUTCOME).exists():
            return  # an earlier attempt finished and died before its outcome was published
        result = trainer.run(
            model=model,
            tokenizer=tokenizer,
            train=train,
            validation=validation,
            output_dir=place,
            per_device_train_batch_size=config.resources.per_device_train_batch_size,
            per_device_eval_batch_size=config.resources.per_device_eval_batch_size,
            num_workers=config.resources.num_workers,
            callbacks=[Reporter(job["queue"] if rank == 0 else None, sharded=config.trainer.zero_stage is not None)],
            resume_from_checkpoint=resumed,
        )
        last = place / "last"
        with gathered(model, config.trainer):
            if rank == 0:
                save_adapter(model, tokenizer, last / ADAPTER)
        if rank == 0:
            outcome = {
                "log_history": result.log_history,
                "counts": {"records": len(train), "pairs": sum(len(example.pairs) for example in train)},
                "dropped": dropped,
                "metrics": {
                    "steps": result.global_step,
                    "best_step": result.best_step,
                    "best_metric": result.best_metric,
                    "tokens": result.train_tokens,
                },
            }
            (last / OUTCOME).write_text(json.dumps(outcome))
        ray.train.report({"step": result.global_step}, Checkpoint.from_directory(str(last)) if rank == 0 else None)
    finally:
        if ray.train.get_context().get_local_rank() == 0:
            shutil.rmtree(place, ignore_errors=True)


class Reporter(TrainerCallback):
    """Tells the driver how far training is, and hands each saved checkpoint to Ray Train."""

    def __init__(self, queue: Queue | None, sharded: bool) -> None:
        self.queue, self.sharded = queue, sharded

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.queue is not None:
            logged = next((row["loss"] for row in reversed(state.log_history) if "loss" in row), None)
            self.queue.put((state.global_step, state.max_steps, logged))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        saved = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        # DeepSpeed's optimiser state lies in parts on the machines of their workers; otherwise the first has it all
        whole = state.is_world_process_zero or self.sharded
        checkpoint = Checkpoint.from_directory(str(saved)) if whole else None
        ray.train.report({"step": state.global_step}, checkpoint)


def _resume(folder: Path) -> str | None:
    """The last checkpoint of this run as a local folder, if an earlier attempt left one."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    return str(checkpoint.to_directory(str(folder)))


@contextmanager
def _progress() -> Iterator[Queue]:
    """A queue that workers fill with (step, steps, loss), told as progress lines by a thread of the driver."""
    queue, done = Queue(actor_options={"num_cpus": 0}), threading.Event()

    def tell() -> None:
        progress: Progress | None = None
        while not done.is_set():
            try:
                step, steps, loss = queue.get(timeout=1.0)
            except Empty:
                continue
            progress = progress or Progress("train", steps, "steps")
            progress.reach(step, "" if loss is None else f"loss {loss:.3f}")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        done.set()
        thread.join()
        queue.shutdown()
