"""The kernels that compute a student's layers; the results stay the same, up to rounding."""

from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mint_ray.config.loader import UserError
from mint_ray.layouts.masks import set_attn_implementation
from mint_ray.trainers.config import TrainResources


def set_attention_kernel(model: nn.Module, resources: TrainResources) -> None:
    """Set the attention implementation of the settings. Raises UserError if it cannot train on this machine."""
    if resources.attn_implementation == "flex_attention" and not torch.cuda.is_available():
        raise UserError("train.resources.attn_implementation: flex_attention trains on GPUs only; no GPU found")
    set_attn_implementation(model, resources.attn_implementation)


def compile_layers(model: nn.Module, resources: TrainResources) -> None:
    """Compile the layers in place if `torch_compile` is set.

    Layers of one class share their kernels, which do not depend on the length of a row. Call this after the attention
    implementation is set, because each implementation is compiled separately.
    """
    if resources.torch_compile:
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.compile(dynamic=True)
