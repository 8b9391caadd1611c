"""Conversion of the published EfficientNet-Lite0 checkpoint to safetensors of transformers' EfficientNet.

Lite is EfficientNet-B0 with ReLU6 and without squeeze-and-excitation (Tan, 2020). transformers always has these layers,
so they get weights with which they multiply by exactly one: the output is bit-identical, and they get no gradient.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import EfficientNetConfig, EfficientNetModel

STEM = {"_conv_stem": "embeddings.convolution", "_bn0": "embeddings.batchnorm"}
TOP = {"_conv_head": "encoder.top_conv", "_bn1": "encoder.top_bn"}
BLOCK = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}
SATURATED_BIAS = 100.0
"""Bias for which a sigmoid is exactly 1 in every floating-point format."""


def convert_efficientnet(checkpoint: Path, folder: Path) -> None:
    """Write the model in the `.pth` file `checkpoint` to the new `folder`, for `from_pretrained`.

    The file is a pickle; it is loaded with `weights_only`, so torch refuses anything but tensors.
    """
    config = EfficientNetConfig(
        image_size=224,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_act="relu6",
        hidden_dim=1280,
        squeeze_expansion_ratio=0.001,  # one channel, the minimum
    )
    model = EfficientNetModel(config)
    weights = {
        name: torch.full_like(tensor, SATURATED_BIAS if name.endswith("expand.bias") else 0.0)
        for name, tensor in model.state_dict().items()
        if ".squeeze_excite." in name
    }
    for name, tensor in torch.load(checkpoint, map_location="cpu", weights_only=True).items():
        if not name.startswith("_fc."):  # the classification head of ImageNet's thousand classes
            weights[_new_name(name)] = tensor
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    preprocessing = {
        "image_processor_type": "EfficientNetImageProcessor",
        "size": {"height": 224, "width": 224},
        "image_mean": [127 / 255] * 3,
        "image_std": [128 / 255] * 3,
        "include_top": False,  # otherwise transformers' image processor divides by the standard deviation twice
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=1))


def _new_name(name: str) -> str:
    """Return the name in transformers' model of a tensor of the published checkpoint."""
    module, _, leaf = name.rpartition(".")
    if not module.startswith("_blocks."):
        return f"{(STEM | TOP)[module]}.{leaf}"
    _, number, layer = module.split(".")
    return f"encoder.blocks.{number}.{BLOCK[layer]}.{leaf}"
