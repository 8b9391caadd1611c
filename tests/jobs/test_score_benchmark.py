"""The benchmark of the score stage times the stage and a plain loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "jobs" / "benchmarks" / "score.py"


@pytest.mark.ray
@pytest.mark.slow
def test_the_benchmark_times_loop_and_stage(tmp_path: Path) -> None:
    # as a script, whose actor class is pickled by value for the workers
    command = [sys.executable, str(BENCHMARK), "--teacher", "constant", "--records", "90", "--rows-per-part", "20"]
    done = subprocess.run(
        [*command, "--rounds", "1", "--json"], capture_output=True, text=True, timeout=300, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    runs = json.loads(done.stdout.splitlines()[-1])["runs"]
    (run,) = runs
    assert run["records"] == 90
    assert run["ratio"] == pytest.approx(run["stage_rows_per_second"] / run["loop_rows_per_second"], rel=0.01)
    assert run["stage_rows_per_second"] == pytest.approx(90 / run["stage_seconds"], rel=0.01)


@pytest.mark.ray
@pytest.mark.slow
def test_the_benchmark_times_an_encoder_of_images() -> None:
    command = [sys.executable, str(BENCHMARK), "--teacher", "encoder", "--quick", "--records", "24", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    (run,) = found["runs"]
    assert run["records"] == 24
    assert run["ratio"] == pytest.approx(run["stage_rows_per_second"] / run["loop_rows_per_second"], rel=0.01)
    # decoding takes a part of the time
    assert run["loop_rows_per_second"] < run["model_rows_per_second"]
    assert 0 < run["decode_share"] < 1
    assert found["seconds_per_additional_thousand"] == []
