"""A convolutional network as the vision tower of a LLaVA-style model: its feature map as a sequence of tokens.

`register_vision_towers` must be called before such a model is loaded by transformers' auto classes.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


class ConvolutionalTowerConfig(PreTrainedConfig):
    """The config of the network, and the number of channels of its feature map."""

    model_type = "mint_ray_convolutional_tower"
    sub_configs = {"network_config": AutoConfig}  # noqa: RUF012 -- every transformers config declares it so

    def __init__(self, network_config: Any = None, hidden_size: int = 0, **others: Any) -> None:
        if isinstance(network_config, dict):
            network_config = AutoConfig.for_model(**network_config)
        self.network_config = network_config
        self.hidden_size = hidden_size
        super().__init__(**others)


class ConvolutionalTower(PreTrainedModel):
    """(B, 3, height, width) to (B, tokens, channels); tokens are the cells of the feature map, row by row."""

    config_class = ConvolutionalTowerConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    # it has no attention, so it works with any kernel that the language model uses
    _supports_sdpa = _supports_flex_attn = _supports_flash_attn = _supports_attention_backend = True

    def __init__(self, config: ConvolutionalTowerConfig) -> None:
        super().__init__(config)
        self.network = AutoModel.from_config(config.network_config, attn_implementation="eager")
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Return the tokens (B, tokens, channels), also as the only hidden state."""
        map_BCHW = self.network(pixel_values).last_hidden_state
        tokens_BTC = map_BCHW.flatten(2).transpose(1, 2)
        return BaseModelOutputWithPooling(last_hidden_state=tokens_BTC, hidden_states=(tokens_BTC,))

    def train(self, mode: bool = True) -> ConvolutionalTower:
        """Stay in evaluation mode: batch norm would make the features of an image depend on its batch."""
        super().train(False)
        return self


def register_vision_towers() -> None:
    """Register the vision towers of this package with transformers' auto classes; further calls have no effect."""
    AutoConfig.register(ConvolutionalTowerConfig.model_type, ConvolutionalTowerConfig, exist_ok=True)
    AutoModel.register(ConvolutionalTowerConfig, ConvolutionalTower, exist_ok=True)
