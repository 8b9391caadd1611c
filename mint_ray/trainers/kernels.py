"""Set how a student's layers are computed; what they compute stays the same, up to rounding."""

from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mint_ray.config.loader import UserError
from mint_ray.layouts.masks import set_attention
from mint_ray.trainers.config import TrainResources


def set_kernels(model: nn.Module, resources: TrainResources) -> None:
    """Take the attention kernel that is asked for. Raises UserError for one that cannot train on this machine."""
    if resources.attn_implementation == "flex_attention" and not torch.cuda.is_available():
        raise UserError("train.resources.attn_implementation: flex_attention trains on GPUs only, and there is none")
    set_attention(model, resources.attn_implementation)


def compile_layers(model: nn.Module, resources: TrainResources) -> None:
    """Compile the layers in place if that is asked for: layers of a kind share their kernels, whatever the row length.

    To be called when the attention is settled, for each kind is compiled anew.
    """
    if resources.torch_compile:
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.compile(dynamic=True)
