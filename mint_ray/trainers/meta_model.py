"""The shape of a student counted on a transformers model on torch's meta device, which takes no memory.

Tested by tests/trainers/test_model_shape.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from mint_ray.students.adapters import add_adapter, select_trainable
from mint_ray.students.config import Student
from mint_ray.trainers.model_shape import LayerStack, ModelShape


def shape_from_meta_model(model_config: Any, student: Student) -> ModelShape:
    """Return the shape of `student` whose transformers config is `model_config`.

    Raises UserError if `target_modules` matches no layer.
    """
    vision_config = getattr(model_config, "vision_config", None)
    auto_class = AutoModelForCausalLM if vision_config is None else AutoModelForImageTextToText
    with torch.device("meta"):
        model = auto_class.from_config(model_config)
        num_parameters = model.num_parameters()
        if student.lora_rank is not None:
            model = add_adapter(model, student, is_vlm=vision_config is not None, low_cpu_mem_usage=True)
        elif vision_config is not None:
            select_trainable(model, student)
    trained = {name: weight.numel() for name, weight in model.named_parameters() if weight.requires_grad}
    text_config = model_config.get_text_config()
    shape = ModelShape(
        num_parameters=num_parameters,
        num_trainable=sum(trained.values()),
        vocab_size=text_config.vocab_size,
        text=_layer_stack(text_config),
    )
    cross_attention_layers = getattr(text_config, "cross_attention_layers", None)
    if vision_config is None or not cross_attention_layers:
        # other vision-language models have image tokens in the prompt, which max_length includes
        return shape
    vision = _layer_stack(vision_config)
    return dataclasses.replace(
        shape,
        vision=dataclasses.replace(
            vision, num_layers=vision.num_layers + getattr(vision_config, "num_global_layers", 0)
        ),
        trains_vision=any("vision" in name for name in trained),
        image_tokens=((vision_config.image_size // vision_config.patch_size) ** 2 + 1) * vision_config.max_num_tiles,
        num_cross_attention_layers=len(cross_attention_layers),
    )


def _layer_stack(config: Any) -> LayerStack:
    num_heads = getattr(config, "num_attention_heads", None) or config.attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return LayerStack(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        num_heads=num_heads,
        query_size=num_heads * head_size,
        key_size=(getattr(config, "num_key_value_heads", None) or num_heads) * head_size,
    )
