"""The shape of a student: the sizes and parameter counts that its memory depends on. Importing this loads no torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mint_ray.models.pretrained import PretrainedModel, read_config
from mint_ray.students.config import Student

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
"""Values of `model_type` whose weights are counted here; others are counted by transformers, which loads torch."""

LINEAR_PER_LAYER = 7
OTHER_MODULES = ("model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
OTHER_LAYER_MODULES = (
    *("", ".self_attn", ".self_attn.q_norm", ".self_attn.k_norm", ".mlp", ".mlp.act_fn"),
    *(".input_layernorm", ".post_attention_layernorm"),
)
"""Modules besides the linear maps of the layers, which a pattern in `target_modules` may match too."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerStack:
    """Transformer layers of equal size."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    query_size: int
    """Number of heads times their size."""
    key_size: int
    """Number of key (and value) heads times their size."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes and parameter counts of a student."""

    num_parameters: int
    """Weights of the base model, embeddings included."""
    num_trainable: int
    """Weights with a gradient: those of the adapter, or all."""
    vocab_size: int
    text: LayerStack
    """Layers of the language model."""
    vision: LayerStack | None = None
    """Layers of the vision encoder, if the language model reads images by cross-attention."""
    trains_vision: bool = False
    """True if weights of the vision encoder are trained."""
    image_tokens: int = 0
    """Tokens per image, for cross-attention."""
    num_cross_attention_layers: int = 0
    """Layers of the language model with cross-attention to images."""


def read_shape(model: PretrainedModel, student: Student) -> ModelShape:
    """Return the shape of a student from its `config.json`; no weights are loaded.

    Raises UserError if transformers does not know the architecture, or if `target_modules` matches no layer.
    """
    shape = shape_from_config(read_config(model), student)
    if shape is None:
        from mint_ray.models.architectures import load_config
        from mint_ray.trainers.meta_model import shape_from_meta_model

        shape = shape_from_meta_model(load_config(model), student)
    return shape


def shape_from_config(config: Mapping[str, Any], student: Student) -> ModelShape | None:
    """Return the shape that a `config.json` describes, or None if transformers has to build the model.

    That is the case for other architectures than `LLAMA_LIKE`, for sizes that the config leaves to the defaults of
    transformers, and for LoRA weights on other modules than the layers' linear maps.
    """
    sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    sizes += ["num_key_value_heads", *(["head_dim"] if config.get("model_type") == "qwen3" else [])]
    if config.get("model_type") not in LLAMA_LIKE or any(not config.get(name) for name in sizes):
        return None
    hidden, num_heads = config["hidden_size"], config["num_attention_heads"]
    head_size = config.get("head_dim") or hidden // num_heads
    text = LayerStack(
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        intermediate_size=config["intermediate_size"],
        num_heads=num_heads,
        query_size=num_heads * head_size,
        key_size=config["num_key_value_heads"] * head_size,
    )
    layers = list(_linear_layers(config, text))
    norms = 2 * hidden + (2 * head_size if config["model_type"] == "qwen3" else 0)
    embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    num_parameters = embeddings + text.num_layers * norms + hidden + sum(layer.num_parameters for layer in layers)
    num_trainable: int | None = num_parameters
    if student.lora_rank is not None:
        num_trainable = _count_lora(layers, student.target_modules, student.lora_rank)
    if num_trainable is None:
        return None
    return ModelShape(
        num_parameters=num_parameters, num_trainable=num_trainable, vocab_size=config["vocab_size"], text=text
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Linear:
    """A linear layer."""

    name: str
    inputs: int
    outputs: int
    bias: bool

    @property
    def num_parameters(self) -> int:
        return self.outputs * (self.inputs + self.bias)


def _linear_layers(config: Mapping[str, Any], text: LayerStack) -> Iterator[_Linear]:
    hidden, inner = text.hidden_size, text.intermediate_size
    # Qwen2 has biases on queries, keys and values only, which its config does not state
    is_qwen2 = config["model_type"] == "qwen2"
    attention_bias = is_qwen2 or bool(config.get("attention_bias"))
    output_bias = attention_bias and not is_qwen2
    mlp_bias = bool(config.get("mlp_bias")) and config["model_type"] == "llama"
    if config["model_type"] == "mistral":
        attention_bias = output_bias = False
    for layer in range(text.num_layers):
        for name, outputs in (("q_proj", text.query_size), ("k_proj", text.key_size), ("v_proj", text.key_size)):
            yield _Linear(f"model.layers.{layer}.self_attn.{name}", hidden, outputs, attention_bias)
        yield _Linear(f"model.layers.{layer}.self_attn.o_proj", text.query_size, hidden, output_bias)
        for name in ("gate_proj", "up_proj"):
            yield _Linear(f"model.layers.{layer}.mlp.{name}", hidden, inner, mlp_bias)
        yield _Linear(f"model.layers.{layer}.mlp.down_proj", inner, hidden, mlp_bias)


def _count_lora(layers: list[_Linear], target_modules: str, rank: int) -> int | None:
    """Return the number of LoRA weights, as PEFT selects layers; None if it would select other modules, or none."""
    if target_modules != "all-linear":
        pattern = re.compile(target_modules)
        num_layers = len(layers) // LINEAR_PER_LAYER
        inner = (f"model.layers.{layer}{name}" for layer in range(num_layers) for name in OTHER_LAYER_MODULES)
        if any(pattern.fullmatch(name) for name in (*OTHER_MODULES, *inner)):
            return None
        layers = [layer for layer in layers if pattern.fullmatch(layer.name)]
    return sum(rank * (layer.inputs + layer.outputs) for layer in layers) or None
