from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.tiny import save_tiny_student

BENCHMARKS = Path(__file__).parents[2] / "jobs" / "benchmarks"


def test_the_benchmark_runs_the_same_loss_on_fewer_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("orpo_step")
    student = save_tiny_student(tmp_path / "student")
    arguments = ["--model-id", str(student), "--shape", "answers 95", "--steps", "1", "--threads", "1", "--json"]
    done = CliRunner().invoke(module.main, arguments, catch_exceptions=False)
    (shape,) = json.loads(done.stdout.splitlines()[-1])["shapes"]
    theirs, ours, answer_only, unchunked = shape["runs"]
    assert (theirs["tokens"], ours["tokens"]) == (2 * (500 + 135), 500 + 95 + 135)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert unchunked["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert abs(answer_only["loss"] - theirs["loss"]) > 1e-3
    assert shape["ratio"] == ours["ratio"]
