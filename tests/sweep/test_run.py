"""Whole sweeps, tiny: made-up patients, a two-layer student, two trials at a time on two processors."""

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
from tests.tiny import save_tiny_student

pytestmark = [pytest.mark.ray, pytest.mark.slow]

COMMAND = [sys.executable, "-c", "from mint_ray.cli import main; main()", "sweep"]


def write_spec(folder: Path, space: str, **sweep: Any) -> Path:
    save_tiny_student(folder / "student")
    told = {"metric": "readable", "best": 1, "seeds": 0, **sweep}
    spec = folder / "tiny.yaml"
    spec.write_text(f"""
root: {folder / "out"}
task: {{kind: rare_disease, max_findings: 3, max_absent: 0}}
prepare:
  source: {{kind: hpo, diseases: 8, patients_per_disease: 4}}
  splits: {{validation: 0.25, test: 0.25}}
pair: {{sampler: {{kind: hard, top: 2}}}}
train:
  student: {{model_id: ./student, lora_rank: 2}}
  trainer: {{train_batch_size: 8, max_length: 2048, max_steps: 4, eval_steps: 1, logging_steps: 1}}
  resources: {{cpus_per_worker: 1}}
evaluate:
  generation: {{max_new_tokens: 4}}
  resources: {{cpus_per_actor: 1}}
sweep: {{{", ".join(f"{key}: {json.dumps(value)}" for key, value in told.items())}, space: {space}}}
""")
    return spec


def sweep(spec: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    done = subprocess.run(
        [*COMMAND, str(spec), "--json", *arguments],
        capture_output=True, text=True, timeout=590, env=dict(os.environ), cwd=spec.parent,
    )  # fmt: skip
    assert done.returncode == code, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"said": done.stdout, "log": done.stderr}


def study_of(spec: Path) -> optuna.Study:
    [journal] = (spec.parent / "out" / "sweeps").glob("*.journal")
    return optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(journal))))


def changed(root: Path) -> dict[str, int]:
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
    # every pair of the last member is longer than it allows: its trial raises
    space = """{
      pair.sampler: {kind: choice, of: [
        {kind: hard, top: 2},
        {kind: margin, top: 2, margin: {kind: float, low: 0.01, high: 0.02, points: 2}}]},
      train.trainer.max_length: {kind: choice, of: [2048, 8]}}"""
    return write_spec(
        tmp_path_factory.mktemp("sweep"), space, trials=4, search={"kind": "grid"}, resources={"max_concurrent": 2}
    )


@pytest.fixture(scope="module")
def swept(spec: Path) -> dict[str, Any]:
    return sweep(spec, code=1)


def test_the_study_is_what_lies_on_disk_and_the_teacher_was_asked_once(spec: Path, swept: dict[str, Any]) -> None:
    root, study = spec.parent / "out", study_of(spec)
    assert swept["trials"] == {"complete": 2, "fail": 2}
    assert len(list(root.glob("score-*"))) == len(list(root.glob("prepare-*"))) == 1
    for trial in study.get_trials(states=[optuna.trial.TrialState.COMPLETE]):
        evaluated = read_manifest(str(root / trial.user_attrs["artifacts"]["evaluate"]))
        assert trial.values == [evaluated.metrics["aligned student"]["readable"]["value"]]
        assert evaluated.config["evaluate"]["split"] == "validation"
        steps = [
            row["step"]
            for row in json.loads((root / trial.user_attrs["artifacts"]["train"] / "outcome.json").read_text())[
                "log_history"
            ]
            if "eval_loss" in row
        ]
        assert [int(step) for step in trial.user_attrs["curve"]] == steps == [1, 2, 3, 4]
    # the default and the first trial are the same student: it is trained once
    assert len(list(root.glob("train-*"))) == 2
    scored = read_manifest(str(next(root.glob("score-*")))).seconds
    assert scored > 0


def test_a_trial_that_raises_is_in_the_table_with_its_error(swept: dict[str, Any]) -> None:
    assert swept["said"].count("raised: ") == 2
    assert "no record to train on has 8 tokens or fewer" in (Path(swept["report"]) / "report.html").read_text()


def test_only_the_default_and_the_winner_meet_the_test_split(spec: Path, swept: dict[str, Any]) -> None:
    root = spec.parent / "out"
    splits = [read_manifest(str(path)).config["evaluate"]["split"] for path in root.glob("evaluate-*")]
    # the winner may be the spec as it stands, and is then measured once
    assert splits.count("test") in (1, 2)
    assert splits.count("validation") == 2
    assert verify(swept["report"]) == []


def test_the_best_spec_is_one_that_runs(spec: Path, swept: dict[str, Any]) -> None:
    best = load(PipelineConfig, Path(swept["report"]) / "best.yaml")
    assert (
        best.pair.sampler
        == load(SweepConfig, spec, [f"pair.sampler={json.dumps(swept['winner']['pair.sampler'])}"]).pair.sampler
    )
    assert best.evaluate.split == "test"


def test_a_second_run_executes_nothing(spec: Path, swept: dict[str, Any]) -> None:
    before = changed(spec.parent / "out")
    again = sweep(spec, code=1)
    assert again["report"] == swept["report"]
    assert changed(spec.parent / "out") == before
    assert "ray: connected" not in again["log"]


SPACE = """{
  train.trainer.learning_rate: {kind: float, low: 0.0001, high: 0.1, log: true},
  pair.sampler: {kind: choice, of: [
    {kind: hard, top: 2}, {kind: margin, top: 2, margin: {kind: float, low: 0.01, high: 0.02}}]}}"""
SETTINGS: dict[str, Any] = {
    "trials": 3,
    "search": {"kind": "tpe", "startup_trials": 2},
    "pruner": {"kind": "asha", "reduction_factor": 2},
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    spec = write_spec(tmp_path_factory.mktemp("unbroken"), SPACE, **SETTINGS)
    sweep(spec)
    return decisions(spec)


@pytest.mark.parametrize("turn", range(3))
def test_killed_at_a_random_moment_it_goes_on_as_if_nothing_had_happened(
    turn: int, tmp_path: Path, unbroken: list[Any]
) -> None:
    spec = write_spec(tmp_path, SPACE, **SETTINGS)
    seed = random.SystemRandom().randrange(1_000_000)
    print(f"turn {turn}: seed {seed}")
    # counted in entries of the journal, of which a trial makes some twenty: as random on a slow machine as on a fast one
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
    assert [row[:3] for row in found] == [row[:3] for row in unbroken]
    for row, other in zip(found, unbroken, strict=True):
        # up to the rounding of a training that went on from a checkpoint
        assert row[3] == pytest.approx(other[3], rel=1e-4)
