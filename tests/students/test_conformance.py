"""Every family of students passes the conformance suite, and so does an architecture that is defined here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.students.conformance import assert_conforms
from tests.tiny import FAMILIES, SIZES, tiny_model, tiny_tokenizer
from tests.vision_students import noise, save_tiny_vlm


class ToyConfig(LlamaConfig):
    model_type = "toy_student"


class ToyModel(LlamaForCausalLM):
    """A Llama with logits half as large."""

    config_class = ToyConfig

    def forward(self, *args: Any, position_ids: Any = None, **options: Any) -> Any:
        output = super().forward(*args, position_ids=position_ids, **options)
        output.logits = output.logits * 0.5
        return output


class UnpositionedConfig(LlamaConfig):
    model_type = "unpositioned_student"


class UnpositionedModel(LlamaForCausalLM):
    """A Llama that ignores `position_ids`, so that padding changes its answers."""

    config_class = UnpositionedConfig

    def forward(self, *args: Any, position_ids: Any = None, **options: Any) -> Any:
        return super().forward(*args, **options)


def save_own(model_class: Any, config_class: Any, folder: Path) -> Path:
    """Register an architecture as `models.vision_towers` does, and save a tiny model of it."""
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    torch.manual_seed(0)
    model_class(config_class(**SIZES)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


# Gemma 2 has no SDPA attention, with which students are loaded
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_text_students_conform(family: str, tmp_path: Path) -> None:
    tiny_model(family=family).save_pretrained(tmp_path / "student")
    tiny_tokenizer().save_pretrained(tmp_path / "student")
    assert_conforms(tmp_path / "student", tmp_path)


@pytest.mark.parametrize("family", ["llava", "idefics3", "gemma3", "mllama"])
def test_vision_language_students_conform(family: str, tmp_path: Path) -> None:
    save_tiny_vlm(tmp_path / "student", family)
    assert_conforms(tmp_path / "student", tmp_path, [noise(seed, 40, 40 + 20 * seed) for seed in range(3)])


def test_a_new_architecture_conforms(tmp_path: Path) -> None:
    assert_conforms(save_own(ToyModel, ToyConfig, tmp_path / "student"), tmp_path)


def test_an_architecture_without_positions_does_not_conform(tmp_path: Path) -> None:
    folder = save_own(UnpositionedModel, UnpositionedConfig, tmp_path / "student")
    with pytest.raises(AssertionError, match="generate"):
        assert_conforms(folder, tmp_path)
