"""A whole comparison, tiny: made-up patients, the ontology teacher, a two-layer student, two methods, two seeds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mint_ray.artifacts import verify
from mint_ray.compare import plan_methods
from mint_ray.config import ComparisonConfig
from mint_ray.loading import UserError, from_data, load
from mint_ray.stages.config import Pair
from tests.tiny import save_tiny_student

SPEC = """
title: Tiny comparison
task: {{kind: rare_disease}}
prepare:
  source: {{kind: hpo, diseases: 8, patients_per_disease: 6}}
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


def modified(root: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in root.glob("*/manifest.json")}


@pytest.mark.ray
def test_a_comparison_shares_what_is_shared_reports_what_fails_and_is_not_run_twice(spec: Path) -> None:
    root = spec.parent / "out"
    first = mint_ray("compare", str(spec), "--root", str(root), "--json", code=1)
    found: dict[str, Any] = json.loads(first.stdout.splitlines()[-1])
    made = modified(root)
    stages = [name.rpartition("-")[0] for name in made]
    # teacher and base student are asked once; ORPO and SFT are trained with two seeds each
    counts = {stage: stages.count(stage) for stage in sorted(set(stages))}
    assert counts == {
        "prepare": 1, "fit": 1, "score": 1, "pair": 2, "tokenize": 2, "train": 4, "answer": 5, "evaluate": 4,
        "compare": 1,
    }  # fmt: skip
    assert list(found["metrics"]) == ["teacher", "base student", "orpo", "sft, renamed"]
    assert found["failed"] == {"hopeless": "pair.sampler: margin drew no pair from 48 rankings"}
    assert "failed: hopeless: pair.sampler: margin drew no pair" in first.stdout
    assert verify(found["report"]) == []

    report = Path(found["report"])
    summary = json.loads((report / "comparison.json").read_text())
    rows = {row["name"]: row for row in summary["methods"]}
    assert [rows[name]["role"] for name in rows] == ["ceiling", "baseline", "method", "control", "method"]
    assert rows["orpo"]["runs"] == 2
    assert rows["orpo"]["cost"]["pairs"] > 0
    assert rows["orpo"]["cost"]["tokens"] > 0
    tested = [(test["first"], test["second"]) for test in summary["tests"]]
    assert tested == [("orpo", "base student"), ("sft, renamed", "base student"), ("sft, renamed", "orpo")]
    assert summary["spec"]["seeds"] == [0, 1]
    assert set(summary["manifests"]) <= set(made)
    page = (report / "report.html").read_text()
    for word in ("control; 2 seeds", "hopeless", "margin drew no pair", "Leak check", "seeds"):
        assert word in page
        assert word in (report / "report.md").read_text() or word == "seeds"

    again = mint_ray("compare", str(spec), "--root", str(root), "--json", code=1)
    assert json.loads(again.stdout.splitlines()[-1]) == found
    assert modified(root) == made


def config(methods: dict[str, Any], **more: Any) -> ComparisonConfig:
    base = {
        "task": {"kind": "rare_disease"},
        "prepare": {"source": {"kind": "hpo"}},
        "train": {"student": {"model_id": "bundled:smollm2-135m-instruct"}},
        "methods": methods,
    }
    return from_data(ComparisonConfig, {**base, **more})


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        ({"prepare.splits.seed": 1}, "prepare.splits.seed"),
        ({"train.student.lora_rank": 64}, "train.student.lora_rank"),
        ({"train.trainer.learning_rate": 1e-3}, "train.trainer.learning_rate"),
        ({"train.trainer.num_train_epochs": 2.0}, "train.trainer.num_train_epochs"),
        ({"task.hide_gene": False}, "task.hide_gene"),
        ({"evaluate.generation.max_new_tokens": 500}, "evaluate.generation.max_new_tokens"),
        ({"pair.sampler": {"kind": "truth", "top": 4}}, "pair.sampler.top"),
        ({"pair.sampler.pairs_per_record": 3}, "pair.sampler.pairs_per_record"),
    ],
)
def test_a_method_that_does_not_share_is_refused_unless_it_says_so(overrides: dict[str, Any], path: str) -> None:
    with pytest.raises(UserError, match=rf"^methods\.m: {re.escape(path)}: all methods share this; `unequal: true`"):
        plan_methods(config({"m": overrides}))
    [method] = plan_methods(config({"m": {**overrides, "unequal": True}}))
    assert method.unequal == [path]


def test_what_changes_no_result_and_what_is_compared_may_differ() -> None:
    free = {
        "train.trainer.objective": {"kind": "dpo"}, "pair.control": "swapped",
        "pair.sampler": {"kind": "sibling", "top": 3}, "train.resources.per_device_train_batch_size": 1,
    }  # fmt: skip
    [method] = plan_methods(config({"m": free}))
    assert method.unequal == []
    assert method.role == "control"


def test_seeds_reach_training_and_what_it_draws_and_never_the_split() -> None:
    methods = {"fixed": {"pair.sampler": {"kind": "hard"}}, "drawn": {"pair.sampler": {"kind": "truth"}}}
    fixed, drawn = plan_methods(config(methods, seeds=[3, 5]))
    assert [each.train.trainer.seed for each in fixed.configs] == [3, 5]
    assert [each.pair.sampler.seed for each in fixed.configs] == [0, 0], "the pairs are the same: they are drawn once"
    assert [each.pair.sampler.seed for each in drawn.configs] == [3, 5]
    assert {each.prepare.splits.seed for each in (*fixed.configs, *drawn.configs)} == {0}


def test_a_base_student_is_not_trained_so_it_runs_once() -> None:
    [method] = plan_methods(config({"m": {"student": "base"}}, seeds=[0, 1, 2]))
    assert len(method.configs) == 1
    assert method.student == "base student"


@pytest.mark.parametrize(
    ("methods", "more", "message"),
    [
        ({}, {}, "methods must name at least one method"),
        ({"teacher": {}}, {}, "'teacher' cannot be the name of a method"),
        ({"m": {}}, {"seeds": [1, 1]}, "seeds must be different"),
        ({"m": {}}, {"reference": "n"}, "reference must be one of m, got 'n'"),
        ({"m": {}}, {"max_similarity": 1.5}, "got 1.5"),
        ({"m": {"train.trainer.objective.bta": 1}}, {}, r"^methods\.m: .*train\.trainer\.objective\.bta: unknown key"),
        ({"m": {"student": "both"}}, {}, r"methods\.m\.student: expected base or aligned, got 'both'"),
        ({"m": {"unequal": "yes"}}, {}, r"methods\.m\.unequal: expected true or false, got 'yes'"),
    ],
)
def test_a_bad_method_is_named(methods: dict[str, Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_methods(config(methods, **more))


def test_the_shipped_comparison_is_on_equal_terms_and_has_its_controls() -> None:
    shipped = load(ComparisonConfig, Path(__file__).parent.parent / "jobs" / "compare.yaml")
    methods = {method.name: method for method in plan_methods(shipped)}
    assert all(method.unequal == [] and len(method.configs) == 3 for method in methods.values())
    assert {method.configs[0].pair.control for method in methods.values()} == {None, "swapped", "relabelled"}
    assert methods["orpo"].configs[0].pair == Pair(sampler=shipped.pair.sampler)
