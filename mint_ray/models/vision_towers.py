"""Let a convolutional network be the vision tower of a Llava: its map of features as a row of tokens.

Importing this makes the form known to transformers' Auto classes, which whoever loads such a student needs.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


class MapTowerConfig(PreTrainedConfig):
    """The network's own config, and how many channels its map has."""

    model_type = "mint_ray_map_tower"
    sub_configs = {"network_config": AutoConfig}  # noqa: RUF012 -- as every config of transformers declares it

    def __init__(self, network_config: Any = None, hidden_size: int = 0, **others: Any) -> None:
        if isinstance(network_config, dict):
            network_config = AutoConfig.for_model(**network_config)
        self.network_config = network_config
        self.hidden_size = hidden_size
        super().__init__(**others)


class MapTower(PreTrainedModel):
    """(B, 3, height, width) to (B, tokens, channels), row by row of the map."""

    config_class = MapTowerConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    # no attention of its own: whatever kernel the rest of a student takes
    _supports_sdpa = _supports_flex_attn = _supports_flash_attn = _supports_attention_backend = True

    def __init__(self, config: MapTowerConfig) -> None:
        super().__init__(config)
        self.network = AutoModel.from_config(config.network_config, attn_implementation="eager")
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        map_BCHW = self.network(pixel_values).last_hidden_state
        tokens_BTC = map_BCHW.flatten(2).transpose(1, 2)
        return BaseModelOutputWithPooling(last_hidden_state=tokens_BTC, hidden_states=(tokens_BTC,))

    def train(self, mode: bool = True) -> MapTower:
        """Stays as if it were asked, whether it learns or not: batch norm would make an image depend on its batch."""
        super().train(False)
        return self


AutoConfig.register(MapTowerConfig.model_type, MapTowerConfig)
AutoModel.register(MapTowerConfig, MapTower)
