"""A whole comparison, tiny: simulated patients, the ontology teacher, a two-layer student, two methods, two seeds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mint_ray.artifacts import verify
from mint_ray.compare.plan import plan_methods
from mint_ray.compare.run import write_comparison
from mint_ray.records import Method
from tests.compare.runs import ALIGNED, config, predictions, write_run
from tests.tiny import save_tiny_student

SPEC = """
title: Tiny comparison
task: {{kind: rare_disease}}
prepare:
  source: {{kind: hpo, num_diseases: 8, patients_per_disease: 6}}
  splits: {{validation: 0.2, test: 0.3}}
pair: {{sampler: {{kind: hard, top: 2}}}}
train:
  student: {{model_id: {student}, lora_rank: 2}}
  trainer: {{train_batch_size: 8, max_length: 2048, max_steps: 1, logging_steps: 1}}
  resources: {{cpus_per_worker: 1}}
evaluate:
  resamples: 100
  generation: {{max_new_tokens: 8}}
  resources: {{cpus_per_actor: 1}}
seeds: [0, 1]
resources: {{max_concurrent: 2}}
methods:
  orpo: {{train.trainer.objective: {{kind: orpo}}}}
  sft, renamed: {{train.trainer.objective: {{kind: sft}}, pair.control: relabelled}}
  hopeless: {{pair.sampler: {{kind: margin, top: 2, margin: 1.0}}}}
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    save_tiny_student(folder / "student")
    path = folder / "compare.yaml"
    path.write_text(SPEC.format(student=folder / "student"))
    return path


def mint_ray(*arguments: str, code: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from mint_ray.cli import main; main()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=dict(os.environ))
    assert done.returncode == code, done.stderr[-4000:]
    return done


def modification_times(root: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in root.glob("*/manifest.json")}


@pytest.mark.ray
@pytest.mark.slow
def test_a_comparison_shares_artifacts_reports_failures_and_does_not_run_twice(spec: Path) -> None:
    root = spec.parent / "out"
    first = mint_ray("compare", str(spec), "--root", str(root), "--json", code=1)
    found: dict[str, Any] = json.loads(first.stdout.splitlines()[-1])
    made = modification_times(root)
    stages = [name.rpartition("-")[0] for name in made]
    # teacher and base student answer once; ORPO and SFT are trained with two seeds each
    counts = {stage: stages.count(stage) for stage in sorted(set(stages))}
    assert counts == {
        "prepare": 1, "fit": 1, "score": 1, "pair": 2, "tokenize": 2, "train": 4, "answer": 5, "evaluate": 4,
        "compare": 1,
    }  # fmt: skip
    measured = [(row["name"], row["student"]) for row in found["metrics"]["methods"]]
    assert measured == [(None, "teacher"), (None, "base"), ("orpo", "aligned"), ("sft, renamed", "aligned")]
    assert found["failed"] == {"hopeless": "pair.sampler: margin drew no pair from 48 records"}
    assert "failed: hopeless: pair.sampler: margin drew no pair" in first.stdout
    assert verify(found["report"]) == []

    report = Path(found["report"])
    summary = json.loads((report / "comparison.json").read_text())
    rows = {row["name"] or Method(**row["method"]).title: row for row in summary["rows"]}
    assert [rows[name]["role"] for name in rows] == ["ceiling", "baseline", "method", "control", "method"]
    assert rows["orpo"]["runs"] == 2
    assert rows["orpo"]["cost"]["pairs"] > 0
    assert rows["orpo"]["cost"]["tokens"] > 0
    tested = [(test["first"], test["second"]) for test in summary["tests"]]
    orpo, sft = "orpo/free", "sft, renamed/free"
    assert tested == [(orpo, "base"), (sft, "base"), (sft, orpo)]
    assert summary["spec"]["seeds"] == [0, 1]
    assert set(summary["manifests"]) <= set(made)
    page, markdown = (report / "report.html").read_text(), (report / "report.md").read_text()
    for word in ("control; 2 seeds", "hopeless", "margin drew no pair", "Near-duplicates"):
        assert word in page
        assert word in markdown

    again = mint_ray("compare", str(spec), "--root", str(root), "--json", code=1)
    assert json.loads(again.stdout.splitlines()[-1]) == found
    assert modification_times(root) == made


def test_if_every_method_fails_there_is_still_a_report(tmp_path: Path) -> None:
    comparison = config({"orpo": {}}, root=str(tmp_path))
    done = write_run(tmp_path, "orpo", predictions(ALIGNED, 1))
    report = write_comparison(
        comparison, plan_methods(comparison), done["prepare"], {"orpo": []}, {"orpo": "out of memory"}
    )
    assert "out of memory" in (Path(report.uri) / "table.txt").read_text()
    assert report.manifest.counts["methods_failed"] == 1


def test_metrics_of_the_manifest_are_rows_with_the_fields_of_a_method(tmp_path: Path) -> None:
    comparison = config({"teacher": {}}, root=str(tmp_path), pair={"sampler": {"kind": "hard", "top": 2}})
    done = write_run(tmp_path, "m", [*predictions(Method(student="teacher"), 7), *predictions(ALIGNED, 3)])
    report = write_comparison(comparison, plan_methods(comparison), done["prepare"], {"teacher": [done]}, {})
    rows = report.manifest.metrics["methods"]
    # a method that is named like the teacher is still another row
    assert [(row["name"], row["student"], row["mode"]) for row in rows] == [
        (None, "teacher", "free"), ("teacher", "aligned", "free")
    ]  # fmt: skip
    assert [row["metrics"]["top_1_accuracy"]["value"] for row in rows] == [7 / 8, 3 / 8]
