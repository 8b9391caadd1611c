"""Fit the teacher on the records that are not held out."""

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

from mint_ray import lineage, storage
from mint_ray.artifacts import RUNS, Artifact
from mint_ray.config.stages import Fit
from mint_ray.records import Label, Record
from mint_ray.runtime.train_workers import run_workers
from mint_ray.teachers import FitReport, Teacher, TrainableTeacher, build_teacher
from mint_ray.telemetry import Progress

logger = logging.getLogger("mint_ray")

FOLDER, REPORT, FINISHED = "teacher", "report.json", "finished"


def fit_teacher(root: str, config: Fit, records: Artifact) -> Artifact:
    """Write folder `teacher`, as the teacher saves itself.

    A teacher that is trained by gradient descent runs in Ray Train workers; if it is cut off, the same config resumes
    from the last epoch, also with another number of workers.
    """
    artifact = lineage.fit(root, config, records)
    if artifact.is_complete:
        return artifact
    teacher = build_teacher(config.teacher)
    with artifact.write() as draft:
        folder = draft.folder / FOLDER
        if isinstance(teacher, TrainableTeacher):
            report = _train(artifact, config, records, folder)
        else:
            report = teacher.fit(records.rows(Label, "labels"), records.rows(Record, "records"))
            folder.mkdir()
            teacher.save(folder)
        draft.counts.update(report.counts)
        draft.dropped.update(report.dropped)
        draft.metrics.update(report.metrics)
    storage.delete_folder(storage.join(storage.absolute(root), RUNS, artifact.name))
    figures = {**{name: f"{count:,}" for name, count in report.counts.items()}, **report.metrics}
    logger.info("fit: %s, %s", config.teacher.kind, ", ".join(f"{name} {value}" for name, value in figures.items()))
    return artifact


def fit_worker(job: dict[str, Any]) -> None:
    """Train in one worker; rank 0 reports the checkpoints."""
    config: Fit = job["config"]
    records: Artifact = job["records"]
    torch.set_num_threads(max(1, int(config.resources.cpus_per_worker)))
    if torch.cuda.is_available():
        torch.cuda.set_device(get_device())
    rank = ray.train.get_context().get_world_rank()
    folder = Path(tempfile.mkdtemp(prefix="mint-ray-"))
    try:
        checkpoint = ray.train.get_checkpoint()
        resumed = None if checkpoint is None else Path(checkpoint.to_directory(str(folder / "resumed")))
        if resumed is not None and (resumed / REPORT).exists():
            return  # an earlier attempt finished and failed before its teacher was published
        teacher: Any = build_teacher(config.teacher)
        checkpoints = EpochCheckpoints(folder, resumed, job["queue"] if rank == 0 else None)
        report = teacher.train(records.rows(Label, "labels"), records.rows(Record, "records"), checkpoints)
        finished = _save(folder / FINISHED, teacher, report) if rank == 0 else None
        ray.train.report({}, finished, checkpoint_dir_name=FINISHED)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class EpochCheckpoints:
    """Checkpoints after each epoch, reported to Ray Train, and progress, reported to the driver."""

    def __init__(self, workspace: Path, resumed: Path | None, queue: Queue | None) -> None:
        self.workspace, self.resumed, self.queue = workspace, resumed, queue
        self.progress_reports = 0
        """Reports ahead of the first epoch: an attempt that starts again reads the records again."""

    def resume_from(self) -> Path | None:
        """Return the folder of the last checkpoint; None at the start."""
        return self.resumed

    def report_progress(self, done: int, total: int) -> None:
        """Report the number of records read ahead of the first epoch to the driver."""
        if self.queue is not None:
            self.progress_reports += 1
            self.queue.put((self.progress_reports, "records", done, total, ""))

    def save_checkpoint(self, save: Callable[[Path], None], epoch: int, num_epochs: int, message: str) -> None:
        """Save the state after an epoch on rank 0, and report it to Ray Train."""
        checkpoint = None
        if self.queue is not None:
            self.queue.put((self.progress_reports + epoch, "epochs", epoch, num_epochs, message))
            folder = self.workspace / f"epoch-{epoch}"
            folder.mkdir()
            save(folder)
            checkpoint = Checkpoint.from_directory(str(folder))
        ray.train.report({"epoch": epoch}, checkpoint, checkpoint_dir_name=f"epoch-{epoch}")
        shutil.rmtree(self.workspace / f"epoch-{epoch}", ignore_errors=True)


def _train(artifact: Artifact, config: Fit, records: Artifact, folder: Path) -> FitReport:
    lines: dict[str, Progress] = {}

    def on_message(_step: int, unit: str, done: int, total: int, message: str) -> None:
        if unit not in lines:
            lines[unit] = Progress("fit", total, unit)
        lines[unit].update(done, message)

    job = {"config": config, "records": records}
    result = run_workers(fit_worker, job, artifact, config.resources, on_message)
    with result.checkpoint.as_directory() as finished:
        shutil.copytree(Path(finished) / FOLDER, folder)
        return FitReport(**json.loads((Path(finished) / REPORT).read_text()))


def _save(folder: Path, teacher: Teacher, report: FitReport) -> Checkpoint:
    (folder / FOLDER).mkdir(parents=True)
    teacher.save(folder / FOLDER)
    (folder / REPORT).write_text(json.dumps(dataclasses.asdict(report)))
    return Checkpoint.from_directory(str(folder))
