from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mint_ray.artifacts import open_artifact
from mint_ray.cli import cli
from mint_ray.config.loader import load
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.plan import plan_steps
from tests.cli.commands import FRAMEWORKS, imported_by, write_spec

KEYS = ["prepare", "fit", "score", "pair", "tokenize", "train", "answer/base", "answer/aligned", "evaluate", "report"]


def test_a_plan_lists_the_steps_of_a_run_writes_nothing_and_imports_no_framework(folder: Path) -> None:
    spec = write_spec(folder, "{kind: hpo}")
    root = folder / "planned"
    done, modules = imported_by("plan", str(spec), "--root", str(root))
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines[:-1]] == KEYS
    assert {line[1] for line in lines[:-1]} == {"run"}
    assert done.stdout.splitlines()[-1] == f"{len(KEYS)} of {len(KEYS)} steps will run"
    assert not root.exists()
    assert not modules & FRAMEWORKS


def test_a_complete_step_is_planned_as_complete(folder: Path, tmp_path: Path) -> None:
    spec = write_spec(folder, "{kind: hpo}")
    prepare = plan_steps(load(PipelineConfig, spec, [f"root={tmp_path}"]), "prepare")["prepare"].artifact
    with open_artifact(prepare.root, prepare.stage, prepare.config, prepare.inputs).write():
        pass
    done = CliRunner().invoke(cli, ["plan", str(spec), "--root", str(tmp_path), "--stage", "fit", "--json"])
    assert done.exit_code == 0, done.output
    steps = json.loads(done.stdout.splitlines()[-1])
    assert [(step["key"], step["state"]) for step in steps] == [("prepare", "complete"), ("fit", "run")]
    assert steps[0]["artifact"] == prepare.uri


@pytest.mark.parametrize(
    "section",
    [
        "methods: {dpo: {train.trainer.objective: {kind: dpo}}}",
        "sweep: {space: {train.student.lora_rank: {kind: int, low: 2, high: 8}}}",
    ],
    ids=["comparison", "sweep"],
)
def test_a_comparison_or_a_sweep_is_planned_as_the_run_of_its_spec(folder: Path, tmp_path: Path, section: str) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"{write_spec(folder, '{kind: hpo}').read_text()}\n{section}\n")
    done = CliRunner().invoke(cli, ["plan", str(spec), "--root", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    assert [step["key"] for step in json.loads(done.stdout.splitlines()[-1])] == KEYS
