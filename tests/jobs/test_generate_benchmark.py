"""The benchmark of generation times both variants and compares their answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import save_tiny_student

BENCHMARK = Path(__file__).parents[2] / "jobs" / "benchmarks" / "generate.py"


def test_the_benchmark_times_both_variants_and_compares_their_answers(tmp_path: Path) -> None:
    student = save_tiny_student(tmp_path / "student")
    command = [sys.executable, str(BENCHMARK), "--model", str(student), "--records", "5", "--batch-size", "2"]
    done = subprocess.run(
        [*command, "--max-new-tokens", "4", "--rounds", "1", "--json"],
        capture_output=True, text=True, timeout=300, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["records"], found["same_answers"], found["batch_size"]) == (5, 5, 2)
    assert found["ratio"] == pytest.approx(found["one_per_call_seconds"] / found["batched_seconds"], rel=0.1)
