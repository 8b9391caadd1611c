"""A convolutional network as a vision tower."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, LlamaConfig, LlavaConfig

from mint_ray.layouts.masks import SPLIT_SDPA, get_attn_implementation, set_attn_implementation
from mint_ray.models.vision_towers import ConvolutionalTower, ConvolutionalTowerConfig, register_vision_towers
from tests.encoders import save_tiny_efficientnet
from tests.tiny import SIZES


def test_a_feature_map_becomes_tokens_row_by_row_and_can_be_saved(tmp_path: Path) -> None:
    network = AutoModel.from_pretrained(save_tiny_efficientnet(tmp_path / "network")).eval()
    tower = ConvolutionalTower(ConvolutionalTowerConfig(network_config=network.config, hidden_size=128))
    tower.network.load_state_dict(network.state_dict())
    tower.save_pretrained(tmp_path / "tower")
    register_vision_towers()
    reloaded = AutoModel.from_pretrained(tmp_path / "tower")
    assert AutoConfig.from_pretrained(tmp_path / "tower").hidden_size == 128
    pixels = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        map_BCHW, tokens = network(pixels).last_hidden_state, reloaded(pixels).hidden_states[-1]
    assert map_BCHW.shape == (2, 128, 3, 2)
    assert tokens.shape == (2, 6, 128)
    assert float(tokens.std()) > 0.01
    for row in range(3):
        for column in range(2):
            assert torch.equal(tokens[:, 2 * row + column], map_BCHW[:, :, row, column])


@pytest.mark.parametrize("attention", ["eager", "sdpa", SPLIT_SDPA])
def test_the_attention_of_the_language_model_does_not_change_the_tower(tmp_path: Path, attention: str) -> None:
    network = AutoModel.from_pretrained(save_tiny_efficientnet(tmp_path / "network"))
    tower = ConvolutionalTowerConfig(network_config=network.config, hidden_size=128)
    register_vision_towers()
    model = AutoModelForImageTextToText.from_config(LlavaConfig(vision_config=tower, text_config=LlamaConfig(**SIZES)))
    for name in ("eager" if attention != "eager" else "sdpa", attention):
        set_attn_implementation(model, name)
    assert get_attn_implementation(model) == attention
    assert model.model.vision_tower.network.config._attn_implementation == "eager"


def test_training_mode_does_not_change_batch_norm(tmp_path: Path) -> None:
    network = AutoModel.from_pretrained(save_tiny_efficientnet(tmp_path / "network"))
    tower = ConvolutionalTower(ConvolutionalTowerConfig(network_config=network.config, hidden_size=128)).train()
    before = {name: tensor.clone() for name, tensor in tower.named_buffers()}
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together, alone = tower(images).last_hidden_state, tower(images[:1]).last_hidden_state
    assert all(torch.equal(before[name], tensor) for name, tensor in tower.named_buffers())
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-4)
