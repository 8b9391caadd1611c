"""Make the teacher ready: train it, or gather what it knows, from everything that is not held out."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint
from ray.train.torch import get_device
from ray.util.queue import Queue

from mint_ray import storage
from mint_ray.artifacts import RUNS, Artifact, open_artifact
from mint_ray.config.loader import dump, from_data
from mint_ray.config.stages import Fit
from mint_ray.records import Label, Record
from mint_ray.runtime.train_workers import run_workers
from mint_ray.teachers import FitReport, Teacher, Trainable, build_teacher
from mint_ray.telemetry import Progress

logger = logging.getLogger("mint_ray")

FOLDER, REPORT, FINISHED = "teacher", "report.json", "finished"


def fit_teacher(root: str, config: Fit, records: Artifact) -> Artifact:
    """Folder `teacher`, as the teacher saved it; the manifest holds its settings.

    A teacher that learns by gradient descent is trained in Ray Train workers; a run of it that was cut off goes on from
    its last epoch when the same config is run again, also on another number of workers.
    """
    teacher = build_teacher(config.teacher)
    artifact = open_artifact(root, "fit", {"fit": dump(config)}, {"records": records.name, **teacher.inputs()})
    if artifact.is_complete:
        return artifact
    with artifact.write() as draft:
        folder = draft.folder / FOLDER
        if isinstance(teacher, Trainable):
            report = _train(artifact, config, records, folder)
        else:
            report = teacher.fit(records.rows(Label, "labels"), records.rows(Record, "records"))
            folder.mkdir()
            teacher.save(folder)
        draft.counts.update(report.counts)
        draft.dropped.update(report.dropped)
        draft.metrics.update(report.metrics)
    storage.delete_folder(storage.join(storage.absolute(root), RUNS, artifact.name))
    told = {**{name: f"{count:,}" for name, count in report.counts.items()}, **report.metrics}
    logger.info("fit: %s, %s", config.teacher.kind, ", ".join(f"{name} {value}" for name, value in told.items()))
    return artifact


def fit_worker(job: dict[str, Any]) -> None:
    """What one training process does; rank 0 reports the checkpoints."""
    config: Fit = from_data(Fit, job["fit"])
    torch.set_num_threads(max(1, int(config.resources.cpus_per_worker)))
    if torch.cuda.is_available():
        torch.cuda.set_device(get_device())
    rank = ray.train.get_context().get_world_rank()
    place = Path(tempfile.mkdtemp(prefix="mint-ray-"))
    try:
        checkpoint = ray.train.get_checkpoint()
        resumed = None if checkpoint is None else Path(checkpoint.to_directory(str(place / "resumed")))
        if resumed is not None and (resumed / REPORT).exists():
            return  # an earlier attempt finished and died before its teacher was published
        records: Artifact = job["records"]
        teacher: Any = build_teacher(config.teacher)
        epochs = Epochs(place, resumed, job["queue"] if rank == 0 else None)
        report = teacher.train(records.rows(Label, "labels"), records.rows(Record, "records"), epochs)
        finished = _save(place / FINISHED, teacher, report) if rank == 0 else None
        ray.train.report({}, finished, checkpoint_dir_name=FINISHED)
    finally:
        shutil.rmtree(place, ignore_errors=True)


class Epochs:
    """Hands the state after each epoch to Ray Train, and tells the driver how far training is."""

    def __init__(self, place: Path, resumed: Path | None, queue: Queue | None) -> None:
        self.place, self.resumed, self.queue = place, resumed, queue
        self.looks = 0
        """Messages ahead of the first epoch: an attempt that begins again looks at the records again."""

    def last(self) -> Path | None:
        return self.resumed

    def tell(self, done: int, whole: int) -> None:
        if self.queue is not None:
            self.looks += 1
            self.queue.put((self.looks, "records", done, whole, ""))

    def keep(self, save: Callable[[Path], None], epoch: int, epochs: int, note: str) -> None:
        checkpoint = None
        if self.queue is not None:
            self.queue.put((self.looks + epoch, "epochs", epoch, epochs, note))
            folder = self.place / f"epoch-{epoch}"
            folder.mkdir()
            save(folder)
            checkpoint = Checkpoint.from_directory(str(folder))
        ray.train.report({"epoch": epoch}, checkpoint, checkpoint_dir_name=f"epoch-{epoch}")
        shutil.rmtree(self.place / f"epoch-{epoch}", ignore_errors=True)


def _train(artifact: Artifact, config: Fit, records: Artifact, folder: Path) -> FitReport:
    told: dict[str, Progress] = {}

    def tell(step: int, unit: str, done: int, whole: int, note: str) -> None:
        if unit not in told:
            told[unit] = Progress("fit", whole, unit)
        told[unit].update(done, note)

    result = run_workers(fit_worker, {"fit": dump(config), "records": records}, artifact, config.resources, tell)
    with result.checkpoint.as_directory() as finished:
        shutil.copytree(Path(finished) / FOLDER, folder)
        return FitReport(**json.loads((Path(finished) / REPORT).read_text()))


def _save(folder: Path, teacher: Teacher, report: FitReport) -> Checkpoint:
    (folder / FOLDER).mkdir(parents=True)
    teacher.save(folder / FOLDER)
    (folder / REPORT).write_text(json.dumps(dataclasses.asdict(report)))
    return Checkpoint.from_directory(str(folder))
