"""Load and save students: trainable weights, adapters, and tokenizers that are rejected."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mint_ray.config.loader import UserError
from mint_ray.students.config import Student
from mint_ray.students.loading import (
    load_model,
    load_processor,
    load_tokenizer,
    load_vision_processor,
    save_adapter,
)
from tests.tiny import save_tiny_student
from tests.vision_students import save_tiny_vlm


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_student(tmp_path / "student")


@pytest.fixture
def student(folder: Path) -> Student:
    return Student(model_id=str(folder), lora_rank=4, lora_alpha=8)


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(torch.arange(3, 40).reshape(1, -1)).logits
    return logits


def change_weights(model: Any) -> None:
    """Change every trainable weight; a new adapter has no effect, because its second matrix is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))


def test_only_the_adapter_is_trainable(student: Student) -> None:
    model = load_model(student, trainable=True)
    trainable = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(trainable) == 2 * 7 * 2  # two layers of seven linear maps, two matrices each
    assert all("lora_" in name for name in trainable)
    assert model.training


def test_every_weight_is_trainable_without_lora(student: Student) -> None:
    model = load_model(dataclasses.replace(student, lora_rank=None), trainable=True)
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("lora_rank", [4, None])
def test_a_saved_student_computes_the_same_logits(student: Student, tmp_path: Path, lora_rank: int | None) -> None:
    student = dataclasses.replace(student, lora_rank=lora_rank)
    base = logits_of(load_model(student))
    torch.manual_seed(0)
    model = load_model(student, trainable=True)
    change_weights(model)
    trained = logits_of(model)

    save_adapter(model, load_tokenizer(student), tmp_path / "adapter")

    torch.testing.assert_close(logits_of(load_model(student, adapter=tmp_path / "adapter")), trained)
    assert not torch.allclose(trained, base, atol=1e-2)
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors" if lora_rank else "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt"))]


def test_a_saved_adapter_can_be_trained_further(student: Student, tmp_path: Path) -> None:
    model = load_model(student, trainable=True)
    change_weights(model)
    save_adapter(model, load_tokenizer(student), tmp_path / "adapter")
    resumed = load_model(student, adapter=tmp_path / "adapter", trainable=True)
    assert any(weight.requires_grad for weight in resumed.parameters())
    torch.testing.assert_close(logits_of(resumed), logits_of(model))


def test_an_adapter_names_its_base_model_as_the_config_does(student: Student, tmp_path: Path) -> None:
    save_adapter(load_model(student, trainable=True), load_tokenizer(student), tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == student.model_id


def test_a_folder_without_an_adapter_is_rejected(student: Student, folder: Path) -> None:
    with pytest.raises(UserError, match=r"no adapter_config\.json, but lora_rank is 4"):
        load_model(student, adapter=folder)


def test_a_student_without_a_chat_template_is_rejected(student: Student, folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(student)


def test_only_a_vision_language_student_has_a_vision_processor(student: Student, tmp_path: Path) -> None:
    assert load_vision_processor(student) is None
    assert type(load_processor(student)) is type(load_tokenizer(student))
    vlm = Student(model_id=str(save_tiny_vlm(tmp_path / "vlm")))
    vision_processor = load_vision_processor(vlm)
    assert vision_processor
    assert type(load_processor(vlm)) is type(vision_processor.processor)
