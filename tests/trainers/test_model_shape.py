"""Shapes read from config.json are those of the transformers model, and reading them loads no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from mint_ray.models.pretrained import PretrainedModel
from mint_ray.students.config import Student
from mint_ray.trainers.meta_model import shape_from_meta_model
from mint_ray.trainers.model_shape import read_shape, shape_from_config
from tests.llamas import LLAMAS, PARAMETERS
from tests.tiny import FAMILIES, SIZES
from tests.vision_students import save_tiny_vlm

SMALL: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "llama, tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama, biases": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "llama, wide heads": LlamaConfig(**SMALL, head_dim=16),
    "mistral": MistralConfig(**SMALL, attention_bias=True),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SMALL),
    "qwen3, biases": Qwen3Config(**SMALL, attention_bias=True, head_dim=8),
    **{name: config for name, config in LLAMAS.items() if name != "11b_vision"},
}
STUDENTS = {
    "full": {"lora_rank": None},
    "adapter": {"lora_rank": 16},
    "adapter on attention": {"lora_rank": 3, "target_modules": r".*self_attn\.[qv]_proj"},
    "adapter on one layer": {"lora_rank": 2, "target_modules": r"model\.layers\.0\.mlp\..*_proj"},
}


def make_student(**changes: Any) -> Student:
    return Student(**{"model_id": "llama", "dtype": "bfloat16"} | changes)


@pytest.mark.parametrize("settings", STUDENTS.values(), ids=list(STUDENTS))
@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_a_shape_read_from_the_config_is_that_of_the_model(config: PretrainedConfig, settings: dict[str, Any]) -> None:
    student = make_student(**settings)
    shape = shape_from_config(json.loads(config.to_json_string(use_diff=False)), student)
    assert shape is not None
    assert shape == shape_from_meta_model(config, student)


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ({"model_type": "gemma3_text"}, {}),
        # left to the defaults of transformers
        ({"num_key_value_heads": None}, {}),
        ({"model_type": "qwen3"}, {}),
        # LoRA weights on the head, on embeddings, on what PEFT does not support, and on no layer at all
        ({}, {"target_modules": r".*(q_proj|lm_head)"}),
        ({}, {"target_modules": r".*embed_tokens"}),
        ({}, {"target_modules": r"model\.layers\.0\.mlp\..*"}),
        ({}, {"target_modules": "no_such_layer"}),
    ],
)
def test_what_the_config_does_not_determine_is_left_to_transformers(
    config: dict[str, Any], settings: dict[str, Any]
) -> None:
    assert shape_from_config(SMALL | {"model_type": "llama"} | config, make_student(**settings)) is None


@pytest.mark.parametrize("name", LLAMAS)
def test_parameters_are_as_many_as_the_hub_counts(name: str) -> None:
    student = make_student(lora_rank=None, lora_components=("language", "vision"))
    shape = shape_from_meta_model(LLAMAS[name], student)
    assert shape.num_parameters == PARAMETERS[name]
    assert shape.num_trainable == PARAMETERS[name]


def test_a_vision_encoder_without_an_adapter_is_not_trained() -> None:
    both = shape_from_meta_model(LLAMAS["11b_vision"], make_student(lora_components=("language", "vision")))
    text = shape_from_meta_model(LLAMAS["11b_vision"], make_student())
    assert (both.trains_vision, text.trains_vision) == (True, False)
    assert text.num_trainable < both.num_trainable
    # four tiles of 40 x 40 patches, each with one more token
    assert text.image_tokens == 4 * 1601


@pytest.mark.parametrize("family", ["gemma3", "mllama"])
def test_other_architectures_are_read_by_transformers(family: str, tmp_path: Path) -> None:
    if family == "mllama":
        save_tiny_vlm(tmp_path, family)
    else:
        config_class, options = FAMILIES[family]
        config_class(**SIZES | options).save_pretrained(tmp_path)
    shape = read_shape(PretrainedModel(model_id="tiny", path=str(tmp_path)), make_student(lora_rank=2))
    assert shape.num_parameters > shape.num_trainable > 0
    assert (shape.vision is not None) == (family == "mllama")


def test_estimating_the_memory_of_a_llama_imports_no_heavy_package(tmp_path: Path) -> None:
    LLAMAS["1b"].save_pretrained(tmp_path)
    code = f"""
import sys
from mint_ray.models.pretrained import PretrainedModel
from mint_ray.students.config import Student
from mint_ray.trainers.config import TrainerArguments, TrainResources
from mint_ray.trainers.memory import estimate_memory
from mint_ray.trainers.model_shape import read_shape
student = Student(model_id="llama", lora_rank=16)
shape = read_shape(PretrainedModel(model_id="llama", path={str(tmp_path)!r}), student)
memory = estimate_memory(shape, student, TrainerArguments(), TrainResources(), record_tokens=100)
heavy = {{"torch", "transformers", "deepspeed", "peft", "trl", "ray", "accelerate"}} & set(sys.modules)
print(shape.num_parameters, memory.total > 0, sorted(heavy))
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == f"{PARAMETERS['1b']} True []"
