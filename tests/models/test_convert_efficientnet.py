"""Conversion of EfficientNet-Lite0, compared with a plain implementation of the network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoImageProcessor, AutoModel

from mint_ray.models.convert_efficientnet import convert_efficientnet

# repeats, kernel, stride, expansion, channels in and out: table 1 of Tan and Le, ICML 2019
STAGES = [
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
]
Weights = dict[str, torch.Tensor]


class Plain:
    """The network with the tensor names of the published checkpoint; each call draws new random weights."""

    def __init__(self) -> None:
        self.weights: Weights = {}
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv("_conv_stem", "_bn0", x, 32, 3, stride=2).clamp(0, 6)
        number = 0
        for repeats, kernel, stride, expansion, channels, out in STAGES:
            for repeat in range(repeats):
                name, before = f"_blocks.{number}.", x
                wide = (channels if repeat == 0 else out) * expansion
                if expansion > 1:
                    x = self.conv(f"{name}_expand_conv", f"{name}_bn0", x, wide, 1).clamp(0, 6)
                step = stride if repeat == 0 else 1
                x = self.conv(f"{name}_depthwise_conv", f"{name}_bn1", x, wide, kernel, stride=step, groups=wide)
                x = self.conv(f"{name}_project_conv", f"{name}_bn2", x.clamp(0, 6), out, 1)
                x = x + before if repeat > 0 else x
                number += 1
        return self.conv("_conv_head", "_bn1", x, 1280, 1).clamp(0, 6)

    def conv(
        self, conv: str, norm: str, x: torch.Tensor, out: int, kernel: int, *, stride: int = 1, groups: int = 1
    ) -> torch.Tensor:
        into = x.shape[1] // groups
        weight = self.draw(f"{conv}.weight", (out, into, kernel, kernel)) * (into * kernel**2) ** -0.5 * 2
        self.weights[f"{conv}.weight"] = weight
        mean, bias = (self.draw(f"{norm}.{leaf}", (out,)) * 0.1 for leaf in ("running_mean", "bias"))
        scale, variance = (self.draw(f"{norm}.{leaf}", (out,)).abs() + 0.5 for leaf in ("weight", "running_var"))
        self.weights |= {
            f"{norm}.running_mean": mean,
            f"{norm}.bias": bias,
            f"{norm}.weight": scale,
            f"{norm}.running_var": variance,
            f"{norm}.num_batches_tracked": torch.tensor(1),
        }
        # TensorFlow's padding: an odd pixel goes to the right and bottom
        total = max((-(-x.shape[2] // stride) - 1) * stride + kernel - x.shape[2], 0)
        x = functional.pad(x, (total // 2, total - total // 2) * 2)
        x = functional.conv2d(x, weight, stride=stride, groups=groups)
        return functional.batch_norm(x, mean, variance, scale, bias, eps=1e-3)

    def draw(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)


def test_a_converted_checkpoint_computes_the_same_features(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    plain = Plain()
    expected = plain(images)
    head = {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}
    torch.save(plain.weights | head, tmp_path / "lite0.pth")
    convert_efficientnet(tmp_path / "lite0.pth", tmp_path / "model")
    model = AutoModel.from_pretrained(tmp_path / "model", use_safetensors=True).eval()
    with torch.no_grad():
        features = model(images).last_hidden_state
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    # (color - 127) / 128, as in training, and divided only once
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model", backend="pil")
    flat = np.full((224, 224, 3), [255, 127, 0], dtype=np.uint8)
    values = processor([flat], return_tensors="pt")["pixel_values"][0, :, 5, 5]
    torch.testing.assert_close(values, torch.tensor([1.0, 0.0, -127 / 128]), atol=1e-5, rtol=1e-5)
