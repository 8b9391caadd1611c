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
def test_the_benchmark_times_a_sweep_and_its_trials_one_by_one(tmp_path: Path) -> None:
    spec = write_spec(
        tmp_path, "{train.trainer.learning_rate: {kind: float, low: 0.0001, high: 0.1, log: true}}", trials=2
    )
    command = [sys.executable, str(BENCHMARK), str(spec), "--alone", "1", "--json"]
    # the spec names its student from where it lies
    done = subprocess.run(command, capture_output=True, text=True, timeout=590, env=dict(os.environ), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["trials"] == 2
    assert found["trials_alone"] == 1
    shortest, longest = found["trial_seconds"]
    assert shortest == longest
    # the one stands for both
    assert found["trials_ratio"] == pytest.approx(2 * shortest / found["sweep_seconds"], rel=0.02)
    assert found["ratio"] == pytest.approx(found["alone_seconds"] / found["sweep_seconds"], rel=0.02)
    gained = sum(found["gained_seconds"].values())
    assert gained == pytest.approx(found["alone_seconds"] - found["sweep_seconds"], abs=1)
