"""Ask a student questions beside the task, by lm-evaluation-harness, which is imported only where that is chosen."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from mint_ray import storage
from mint_ray.artifacts import Artifact, open_artifact
from mint_ray.config.loader import UserError, dump
from mint_ray.config.stages import Evaluate, General
from mint_ray.runtime.map_parts import map_blocks
from mint_ray.students import load_model, load_tokenizer, student_revision
from mint_ray.students.config import Student
from mint_ray.telemetry import Progress

logger = logging.getLogger("mint_ray")

HARNESS = "lm_eval"


def check_general(config: General) -> None:
    """Raise UserError if the harness is not installed or does not know a task, before any work."""
    if find_spec(HARNESS) is None:
        raise UserError("evaluate.general: lm_eval is not installed; the extra `harness` brings it")
    if config.folder is not None and not Path(config.folder).is_dir():
        raise UserError(f"evaluate.general.folder: no folder {config.folder!r}")
    known = set(_task_manager(config).all_tasks)
    for task in config.tasks:
        if task not in known:
            where = config.folder or f"lm_eval {_version()}"
            raise UserError(f"evaluate.general.tasks: no task {task!r} in {where}")


def measure_general(root: str, config: Evaluate, student: Student, adapter: Artifact | None) -> Artifact:
    """Metrics of one student by task; kept apart, so that the base student is asked once."""
    general = config.general
    if general is None:
        raise ValueError("evaluate.general is not set")
    inputs = {"student": adapter.name if adapter else student_revision(student), "lm_eval": _version()}
    if general.folder is not None:
        inputs["tasks"] = _digest(Path(general.folder))
    settings = {
        "student": {"model_id": student.model_id, "revision": student.revision, "dtype": student.dtype},
        "general": dump(general),
    }
    artifact = open_artifact(root, "general", settings, inputs)
    if artifact.is_complete:
        return artifact
    with artifact.write() as draft:
        tasks = pa.table({"task": list(general.tasks)})
        resources = config.resources
        progress = Progress("general ability", len(tasks), "tasks")
        for batch in map_blocks(
            [tasks.slice(row, 1) for row in range(len(tasks))],
            HarnessActor,
            (student, config, adapter),
            actors=(1, resources.actors),
            cpus=resources.cpus_per_actor,
            gpus=resources.gpus_per_actor,
        ):
            progress.advance(len(batch))
            for row in batch.to_pylist():
                found = json.loads(row["found"])
                draft.metrics.update(found["metrics"])
                draft.counts.update(found["counts"])
    return artifact


class HarnessActor:
    """Holds one student on a worker and asks it the questions of a task."""

    def __init__(self, student: Student, config: Evaluate, adapter: Artifact | None) -> None:
        from lm_eval.models.huggingface import HFLM

        if config.general is None:
            raise ValueError("evaluate.general is not set")
        self.config = config.general
        torch.set_num_threads(max(1, int(config.resources.cpus_per_actor)))
        with tempfile.TemporaryDirectory() as folder:
            if adapter is not None:
                storage.download_folder(adapter.file_uri("adapter"), folder)
            model = load_model(student, adapter=Path(folder) if adapter else None)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.model = HFLM(pretrained=model, tokenizer=load_tokenizer(student), batch_size=config.resources.batch_size)
        self.manager = _task_manager(self.config)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.table({"found": [json.dumps(self.ask(task)) for task in batch["task"].to_pylist()]})

    def ask(self, task: str) -> dict[str, Any]:
        """`metrics` by task (several if it is a group) and name, `counts` of the questions that each was asked."""
        from lm_eval import simple_evaluate

        results = simple_evaluate(
            model=self.model,
            tasks=[task],
            num_fewshot=self.config.num_fewshot,
            limit=self.config.limit,
            apply_chat_template=self.config.apply_chat_template,
            task_manager=self.manager,
            log_samples=False,
        )
        return {
            "metrics": {name: read_metrics(values) for name, values in results["results"].items()},
            "counts": {f"questions of {name}": asked["effective"] for name, asked in results["n-samples"].items()},
        }


def read_metrics(values: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The harness's `acc,none` and `acc_stderr,none` as `{"acc": {"value": ..., "stderr": ...}}`.

    The filter behind the comma is kept where it is one; a standard error that is not known is left out.
    """
    metrics: dict[str, dict[str, float]] = {}
    for key, value in values.items():
        name, comma, kind = key.partition(",")
        if not comma or name.endswith("_stderr"):
            continue
        measured = {"value": float(value)}
        error = values.get(f"{name}_stderr,{kind}")
        if isinstance(error, int | float) and math.isfinite(error):
            measured["stderr"] = float(error)
        metrics[name if kind == "none" else key] = measured
    return metrics


def _task_manager(config: General) -> Any:
    from lm_eval.tasks import TaskManager

    # reading the thousands that the harness brings takes a quarter of a minute
    return TaskManager(include_path=config.folder, include_defaults=config.folder is None)


def _version() -> str:
    return importlib.metadata.version(HARNESS)


def _digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    lines = [f"{path.relative_to(folder).as_posix()} {storage.sha256(str(path))}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
