"""Turn the published EfficientNet-Lite0 checkpoint into safetensors of transformers' own EfficientNet.

Lite is EfficientNet-B0 with ReLU6 and without squeeze-and-excitation (Tan, 2020). transformers always squeezes, so
those layers are given weights under which they multiply by exactly one: no bit changes, and no gradient reaches them.
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
OPEN = 100.0
"""Bias behind which a sigmoid is 1 to the last bit in any float format."""


def convert_efficientnet(checkpoint: Path, folder: Path) -> None:
    """Write the model behind the `.pth` file `checkpoint` into the new `folder`, as `from_pretrained` reads it.

    The file is a pickle and is read as one of tensors only; anything else in it is refused by torch.
    """
    config = EfficientNetConfig(
        image_size=224,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_act="relu6",
        hidden_dim=1280,
        squeeze_expansion_ratio=0.001,  # one channel, for there has to be one
    )
    model = EfficientNetModel(config)
    weights = {
        name: torch.full_like(tensor, OPEN if name.endswith("expand.bias") else 0.0)
        for name, tensor in model.state_dict().items()
        if ".squeeze_excite." in name
    }
    for name, tensor in torch.load(checkpoint, map_location="cpu", weights_only=True).items():
        if not name.startswith("_fc."):  # the head of ImageNet's thousand classes
            weights[_renamed(name)] = tensor
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    preprocessing = {
        "image_processor_type": "EfficientNetImageProcessor",
        "size": {"height": 224, "width": 224},
        "image_mean": [127 / 255] * 3,
        "image_std": [128 / 255] * 3,
        "include_top": False,  # else transformers' own image processor divides by the deviation a second time
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=1))


def _renamed(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if not module.startswith("_blocks."):
        return f"{(STEM | TOP)[module]}.{leaf}"
    _, number, layer = module.split(".")
    return f"encoder.blocks.{number}.{BLOCK[layer]}.{leaf}"
