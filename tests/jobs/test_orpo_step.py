"""The benchmark of the ORPO step computes the same loss in every variant."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from mint_ray.layouts.concatenated import ConcatenatedLayout
from mint_ray.layouts.shared_prefix import SharedPrefixLayout
from mint_ray.students.config import Student
from tests.tiny import save_tiny_student
from tests.vision_students import FAMILIES

BENCHMARKS = Path(__file__).parents[2] / "jobs" / "benchmarks"


def test_the_shared_prefix_has_the_same_loss_on_fewer_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("orpo_step")
    student = save_tiny_student(tmp_path / "student")
    arguments = ["--model-id", str(student), "--shape", "completions 95", "--steps", "1", "--threads", "1", "--json"]
    done = CliRunner().invoke(module.main, arguments, catch_exceptions=False)
    (shape,) = json.loads(done.stdout.splitlines()[-1])["shapes"]
    trl, shared, completion_only, unchunked = shape["runs"]
    assert (trl["tokens"], shared["tokens"]) == (2 * (500 + 135), 500 + 95 + 135)
    assert shared["loss"] == pytest.approx(trl["loss"], rel=1e-5)
    assert unchunked["loss"] == pytest.approx(trl["loss"], rel=1e-5)
    assert abs(completion_only["loss"] - trl["loss"]) > 1e-3
    assert shape["ratio"] == shared["ratio"]


def test_a_student_with_cross_attention_has_the_same_loss_in_both_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("orpo_step")
    monkeypatch.setattr(module, "MLLAMA_11B", FAMILIES["mllama"]()[0])  # the real one needs a GPU
    device = torch.device("cpu")
    model = module.build_vlm(Student(model_id="none", lora_rank=2), "mllama", device)
    runners = [
        module.layout_runner(name, module.copy_of(model, "sdpa"), layout, "completion")
        for name, layout in (("rows", ConcatenatedLayout()), ("shared", SharedPrefixLayout()))
    ]
    _, four = module.IMAGE_SHAPES
    row = module.measure(four, runners, records=1, steps=1, device=device)
    rows, shared = row["runs"]
    assert (rows["tokens"], shared["tokens"]) == (8 * (1 + 64 + 20), 1 + 64 + 8 * 20)
    assert shared["loss"] == pytest.approx(rows["loss"], rel=1e-5)
