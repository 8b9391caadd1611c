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
    # as a script, whose own actor travels to the workers by value
    command = [sys.executable, str(BENCHMARK), "--teacher", "constant", "--records", "90", "--rows-per-part", "20"]
    done = subprocess.run(
        [*command, "--rounds", "1", "--json"], capture_output=True, text=True, timeout=300, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    runs = json.loads(done.stdout.splitlines()[-1])["runs"]
    (run,) = runs
    assert run["records"] == 90
    assert run["ratio"] == pytest.approx(run["stage_rows_per_second"] / run["bare_rows_per_second"], rel=0.01)
    assert run["stage_rows_per_second"] == pytest.approx(90 / run["stage_seconds"], rel=0.01)


@pytest.mark.ray
@pytest.mark.slow
def test_the_benchmark_times_an_encoder_that_looks_at_images() -> None:
    command = [sys.executable, str(BENCHMARK), "--teacher", "encoder", "--quick", "--records", "24", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    (run,) = told["runs"]
    assert run["records"] == 24
    assert run["ratio"] == pytest.approx(run["stage_rows_per_second"] / run["bare_rows_per_second"], rel=0.01)
    # a loop that decodes is no faster than one that need not, and each takes some of the time
    assert run["bare_rows_per_second"] < run["model_rows_per_second"]
    assert 0 < run["decode_share"] < 1
    assert told["seconds_per_thousand_more"] == []
