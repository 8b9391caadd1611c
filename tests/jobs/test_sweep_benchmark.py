"""The benchmark of sweeps times a sweep and its trials as separate runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sweep.test_run import write_spec

BENCHMARK = Path(__file__).parents[2] / "jobs" / "benchmarks" / "sweep.py"


@pytest.mark.ray
@pytest.mark.slow
def test_the_benchmark_times_a_sweep_and_its_trials_as_separate_runs(tmp_path: Path) -> None:
    spec = write_spec(
        tmp_path, "{train.trainer.learning_rate: {kind: float, low: 0.0001, high: 0.1, log: true}}", trials=2
    )
    command = [sys.executable, str(BENCHMARK), str(spec), "--separate-trials", "1", "--json"]
    # the spec names its student by a relative path
    done = subprocess.run(command, capture_output=True, text=True, timeout=590, env=dict(os.environ), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["trials"] == 2
    assert found["separate_trials"] == 1
    shortest, longest = found["trial_seconds"]
    assert shortest == longest
    # the time of the one is assumed for both
    assert found["trials_ratio"] == pytest.approx(2 * shortest / found["sweep_seconds"], rel=0.02)
    assert found["ratio"] == pytest.approx(found["separate_seconds"] / found["sweep_seconds"], rel=0.02)
    saved = sum(found["saved_seconds"].values())
    assert saved == pytest.approx(found["separate_seconds"] - found["sweep_seconds"], abs=1)
