"""Run general benchmarks on a student with lm-evaluation-harness (an optional dependency)."""

from __future__ import annotations

import json
import logging
import math
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from mint_ray import lineage, storage
from mint_ray.artifacts import Artifact
from mint_ray.config.loader import UserError
from mint_ray.config.stages import Evaluate, EvaluateResources, Harness
from mint_ray.lineage import HARNESS, AnswerRequest, harness_of, harness_version, resolve_student
from mint_ray.runtime.map_parts import Workers, map_blocks
from mint_ray.students.loading import load_model, load_tokenizer
from mint_ray.telemetry import Progress

logger = logging.getLogger("mint_ray")


def check_harness(config: Harness) -> None:
    """Raise UserError if the harness is not installed or does not know a task, before any work."""
    version = harness_version()
    if config.folder is not None and not Path(config.folder).is_dir():
        raise UserError(f"evaluate.harness.folder: no folder {config.folder!r}")
    known = set(_task_manager(config).all_tasks)
    for task in config.tasks:
        if task not in known:
            where = config.folder or f"{HARNESS} {version}"
            raise UserError(f"evaluate.harness.tasks: no task {task!r} in {where}")


def run_harness(root: str, config: Evaluate, request: AnswerRequest) -> Artifact:
    """Write the benchmark metrics of one student into the manifest, by task and metric."""
    harness = harness_of(config)
    artifact = lineage.benchmark(root, harness, request)
    if artifact.is_complete:
        return artifact
    with artifact.write() as draft:
        tasks = pa.table({"task": list(harness.tasks)})
        resources = config.resources
        progress = Progress("benchmark", len(tasks), "tasks")
        workers = Workers(
            worker=HarnessActor,
            arguments=(request, harness, resources),
            actors=(1, resources.actors),
            cpus=resources.cpus_per_actor,
            gpus=resources.gpus_per_actor,
        )
        for batch in map_blocks([tasks.slice(row, 1) for row in range(len(tasks))], workers):
            progress.advance(len(batch))
            for row in batch.to_pylist():
                found = json.loads(row["results"])
                draft.metrics.update(found["metrics"])
                draft.counts.update(found["counts"])
    return artifact


class HarnessActor:
    """Actor that runs harness tasks on one student, which it loads once."""

    def __init__(self, request: AnswerRequest, harness: Harness, resources: EvaluateResources) -> None:
        from lm_eval.models.huggingface import HFLM

        self.config = harness
        torch.set_num_threads(max(1, int(resources.cpus_per_actor)))
        student, adapter = resolve_student(request.student, request.built), request.adapter
        with tempfile.TemporaryDirectory() as folder:
            if adapter is not None:
                storage.download_folder(adapter.file_uri("adapter"), folder)
            model = load_model(student, adapter=Path(folder) if adapter else None)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.model = HFLM(pretrained=model, tokenizer=load_tokenizer(student), batch_size=resources.batch_size)
        self.manager = _task_manager(harness)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Run the tasks of a batch; the column `results` has a JSON object per task."""
        return pa.table({"results": [json.dumps(self.evaluate(task)) for task in batch["task"].to_pylist()]})

    def evaluate(self, task: str) -> dict[str, Any]:
        """Return `metrics` by task (several if it is a group) and `counts` of the questions per task."""
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
            "counts": {f"questions of {name}": samples["effective"] for name, samples in results["n-samples"].items()},
        }


def read_metrics(values: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the harness's `acc,none` and `acc_stderr,none` as `{"acc": {"value": ..., "stderr": ...}}`.

    A filter other than `none` stays in the name; an unknown standard error is left out.
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


def _task_manager(config: Harness) -> Any:
    from lm_eval.tasks import TaskManager

    # the thousands of built-in tasks take 15 seconds to read
    return TaskManager(include_path=config.folder, include_defaults=config.folder is None)
