"""Image and text encoders of two layers with random weights, saved for `from_pretrained`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertModel,
    EfficientNetConfig,
    EfficientNetModel,
    ViltConfig,
    ViltModel,
    ViTConfig,
    ViTModel,
)

from tests.tiny import tiny_tokenizer

SIZE = 32
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": SIZE,
    "patch_size": 16,
    "vocab_size": 400,
    "initializer_range": 0.2,
}
PREPROCESSING = {
    "size": {"height": SIZE, "width": SIZE},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
}


def save_tiny_vit(folder: Path) -> Path:
    return _save(folder, ViTModel, ViTConfig, {name: SHAPE[name] for name in SHAPE if name != "vocab_size"})


def save_tiny_efficientnet(folder: Path) -> Path:
    """A tenth as wide and deep as B0: images of 64 pixels give feature maps of 2 x 2 with 128 channels."""
    shape = {"image_size": 64, "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128}
    _save(folder, EfficientNetModel, EfficientNetConfig, shape)
    size = {"height": 64, "width": 64}
    settings = {"image_processor_type": "EfficientNetImageProcessor", "size": size, "include_top": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING | settings))
    return folder


def save_tiny_bert(folder: Path) -> Path:
    return _save(folder, BertModel, BertConfig, SHAPE)


def save_tiny_vilt(folder: Path) -> Path:
    return _save(folder, ViltModel, ViltConfig, SHAPE)


def _save(folder: Path, model: Any, config: Any, shape: dict[str, Any]) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = model(config(**shape))
        if model is EfficientNetModel:
            # as initialized, a few layers reduce every input to zero; here each has outputs of unit variance
            for layer in network.modules():
                if isinstance(layer, torch.nn.Conv2d):
                    torch.nn.init.kaiming_normal_(layer.weight)
                if isinstance(layer, torch.nn.BatchNorm2d):
                    layer.momentum = 1.0
                    torch.nn.init.ones_(layer.weight)
            network.train()(torch.randn(8, 3, 64, 64))
        network.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    return folder
