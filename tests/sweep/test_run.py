"""Whole sweeps, tiny: simulated patients, a two-layer student, two trials at a time on two CPUs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from mint_ray.artifacts import read_manifest, verify
from mint_ray.config.loader import load
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.config.sweep import SweepConfig
from mint_ray.metrics.methods import read_methods
from mint_ray.records import Method
from tests.tiny import save_tiny_student

pytestmark = [pytest.mark.ray, pytest.mark.slow]

COMMAND = [sys.executable, "-c", "from mint_ray.cli import main; main()", "sweep"]


def write_spec(folder: Path, space: str, **sweep: Any) -> Path:
    save_tiny_student(folder / "student")
    settings = {"metric": "readable", "finalists": 1, "num_seeds": 0, **sweep}
    spec = folder / "tiny.yaml"
    spec.write_text(f"""
root: {folder / "out"}
task: {{kind: rare_disease, max_findings: 3, max_absent: 0}}
prepare:
  source: {{kind: hpo, num_diseases: 8, patients_per_disease: 4}}
  splits: {{validation: 0.25, test: 0.25}}
pair: {{sampler: {{kind: hard, top: 2}}}}
train:
  student: {{model_id: ./student, lora_rank: 2}}
  trainer: {{train_batch_size: 8, max_length: 2048, max_steps: 4, eval_steps: 1, logging_steps: 1}}
  resources: {{cpus_per_worker: 1}}
evaluate:
  generation: {{max_new_tokens: 4}}
  resources: {{cpus_per_actor: 1}}
sweep: {{{", ".join(f"{key}: {json.dumps(value)}" for key, value in settings.items())}, space: {space}}}
""")
    return spec


def sweep(spec: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    done = subprocess.run(
        [*COMMAND, str(spec), "--json", *arguments],
        capture_output=True, text=True, timeout=590, env=dict(os.environ), cwd=spec.parent,
    )  # fmt: skip
    assert done.returncode == code, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"stdout": done.stdout, "log": done.stderr}


def study_of(spec: Path) -> optuna.Study:
    [journal] = (spec.parent / "out" / "sweeps").glob("*.journal")
    return optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(journal))))


def modification_times(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.glob("*-*/manifest.json")}


def decisions(spec: Path) -> list[Any]:
    return [
        [
            trial.number,
            trial.state.name,
            trial.params,
            {str(step): value for step, value in trial.intermediate_values.items()},
        ]
        for trial in study_of(spec).get_trials()
    ]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # every pair is longer than the second maximum length, so its trials fail
    space = """{
      pair.sampler: {kind: choice, choices: [
        {kind: hard, top: 2},
        {kind: margin, top: 2, margin: {kind: float, low: 0.01, high: 0.02, num_points: 2}}]},
      train.trainer.max_length: {kind: choice, choices: [2048, 8]}}"""
    return write_spec(
        tmp_path_factory.mktemp("sweep"), space, n_trials=4, search={"kind": "grid"}, resources={"max_concurrent": 2}
    )


@pytest.fixture(scope="module")
def swept(spec: Path) -> dict[str, Any]:
    return sweep(spec, code=1)


def test_the_study_agrees_with_the_artifacts_and_the_teacher_scored_once(spec: Path, swept: dict[str, Any]) -> None:
    root, study = spec.parent / "out", study_of(spec)
    assert swept["trials"] == {"complete": 2, "fail": 2}
    assert len(list(root.glob("score-*"))) == len(list(root.glob("prepare-*"))) == 1
    for trial in study.get_trials(states=[optuna.trial.TrialState.COMPLETE]):
        evaluated = read_manifest(str(root / trial.user_attrs["artifacts"]["evaluate"]))
        assert trial.values == [read_methods(evaluated.metrics)[Method(student="aligned")]["readable"].value]
        assert evaluated.config["evaluate"]["split"] == "validation"
        steps = [
            row["step"]
            for row in json.loads((root / trial.user_attrs["artifacts"]["train"] / "outcome.json").read_text())[
                "log_history"
            ]
            if "eval_loss" in row
        ]
        assert [int(step) for step in trial.user_attrs["curve"]] == steps == [1, 2, 3, 4]
    # the default and the first trial are the same student, which is trained once
    assert len(list(root.glob("train-*"))) == 2
    scored = read_manifest(str(next(root.glob("score-*")))).seconds
    assert scored > 0


def test_a_failed_trial_is_in_the_table_with_its_error(swept: dict[str, Any]) -> None:
    assert swept["stdout"].count("failed: ") == 2
    assert "no training record has 8 tokens or fewer" in (Path(swept["report"]) / "report.html").read_text()


def test_only_the_default_and_the_winner_are_evaluated_on_the_test_split(spec: Path, swept: dict[str, Any]) -> None:
    root = spec.parent / "out"
    splits = [read_manifest(str(path)).config["evaluate"]["split"] for path in root.glob("evaluate-*")]
    # the winner may be the spec without changes, which is then evaluated once
    assert splits.count("test") in (1, 2)
    assert splits.count("validation") == 2
    assert verify(swept["report"]) == []


def test_the_best_spec_can_be_loaded(spec: Path, swept: dict[str, Any]) -> None:
    best = load(PipelineConfig, Path(swept["report"]) / "best.yaml")
    assert (
        best.pair.sampler
        == load(SweepConfig, spec, [f"pair.sampler={json.dumps(swept['winner']['pair.sampler'])}"]).pair.sampler
    )
    assert best.evaluate.split == "test"


def test_a_second_run_executes_no_stage(spec: Path, swept: dict[str, Any]) -> None:
    before = modification_times(spec.parent / "out")
    again = sweep(spec, code=1)
    assert again["report"] == swept["report"]
    assert modification_times(spec.parent / "out") == before
    assert "ray: connected" not in again["log"]


SPACE = """{
  train.trainer.learning_rate: {kind: float, low: 0.0001, high: 0.1, log: true},
  pair.sampler: {kind: choice, choices: [
    {kind: hard, top: 2}, {kind: margin, top: 2, margin: {kind: float, low: 0.01, high: 0.02}}]}}"""
SETTINGS: dict[str, Any] = {
    "n_trials": 3,
    "search": {"kind": "tpe", "n_startup_trials": 2},
    "pruner": {"kind": "asha", "reduction_factor": 2},
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    spec = write_spec(tmp_path_factory.mktemp("uninterrupted"), SPACE, **SETTINGS)
    sweep(spec)
    return decisions(spec)


@pytest.mark.parametrize("turn", range(3))
def test_a_sweep_that_is_killed_at_a_random_moment_continues_with_equal_decisions(
    turn: int, tmp_path: Path, uninterrupted: list[Any]
) -> None:
    spec = write_spec(tmp_path, SPACE, **SETTINGS)
    seed = random.SystemRandom().randrange(1_000_000)
    print(f"turn {turn}: seed {seed}")
    # counted in journal entries, of which a trial writes about twenty, so that the speed of the machine does not matter
    entries = random.Random(seed).randrange(3, 50)
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen([*COMMAND, str(spec)], stdout=log, stderr=log, env=dict(os.environ), cwd=spec.parent)
    while driver.poll() is None:
        journals = list((tmp_path / "out" / "sweeps").glob("*.journal"))
        if journals and journals[0].read_bytes().count(b"\n") >= entries:
            driver.kill()
        time.sleep(0.05)
    assert driver.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()[-3000:]
    sweep(spec)
    found = decisions(spec)
    assert [row[:3] for row in found] == [row[:3] for row in uninterrupted]
    for row, other in zip(found, uninterrupted, strict=True):
        # equal up to the rounding of a training that resumed from a checkpoint
        assert row[3] == pytest.approx(other[3], rel=1e-4)
