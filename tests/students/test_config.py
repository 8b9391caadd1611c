"""Settings of the student: invalid values, renamed keys, and light imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mint_ray.config.loader import UserError, dump, from_data
from mint_ray.students.config import Component, Generation, Student


@pytest.mark.parametrize(
    "changes",
    [
        {"model_id": " "},
        {"lora_rank": 0},
        {"lora_alpha": -3},
        {"lora_dropout": 1.0},
        {"target_modules": ""},
        {"model_id": "bundled:smollm2-135m-instruct", "revision": "main"},
    ],
)
def test_an_invalid_value_is_rejected_with_its_field(changes: dict[str, object]) -> None:
    field, value = list(changes.items())[-1]
    with pytest.raises(UserError, match=field) as caught:
        from_data(Student, {"model_id": "owner/name", **changes})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ({"lora_components": ()}, "must name a component, got none"),
        ({"modules_to_save": ("language",)}, "must be disjoint, got language in both"),
    ],
)
def test_contradictory_components_are_rejected(components: dict[str, tuple[Component, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Student(model_id="x", **components)  # type: ignore[arg-type]


def test_max_new_tokens_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_new_tokens must be positive, got 0"):
        Generation(max_new_tokens=0)


def test_modes_must_include_free() -> None:
    with pytest.raises(ValueError, match="modes must include free and no mode twice, got rank"):
        Generation(modes=("rank",))


def test_a_student_can_be_dumped_and_loaded() -> None:
    student = Student(model_id="owner/name", lora_rank=None, dtype="bfloat16")
    assert from_data(Student, dump(student)) == student


@pytest.mark.parametrize(
    ("cls", "old", "new"),
    [
        (Student, "lora_parts", "lora_components"),
        (Student, "whole_parts", "modules_to_save"),
        (Generation, "normalise", "length_normalization"),
    ],
)
def test_an_old_key_is_rejected_with_its_new_name(cls: type, old: str, new: str) -> None:
    required = {"model_id": "owner/name"} if cls is Student else {}
    with pytest.raises(UserError, match=f"{old}.*{new}") as caught:
        from_data(cls, {**required, old: []})
    assert "\n" not in str(caught.value)


def test_checks_and_identity_import_no_torch(tmp_path: Path) -> None:
    code = """
import pathlib, sys
from mint_ray.models.pretrained import check_model, model_identity
from mint_ray.students.checks import check_images
from mint_ray.students.config import Student

folder = pathlib.Path(sys.argv[1])
(folder / "config.json").write_text('{"vision_config": {}}')
for name in ("model.safetensors", "tokenizer.json", "processor_config.json"):
    (folder / name).write_bytes(b"")
student = Student(model_id=str(folder))
check_model(student)
check_images(student, show_image=True)
model_identity(student, "student")
model_identity(Student(model_id="bundled:smollm2-135m-instruct"), "student")
print({"torch", "transformers", "ray", "peft"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
