"""Configs of public Llama models, from their `config.json` on the Hub, and their numbers of parameters."""

from __future__ import annotations

from transformers import LlamaConfig, MllamaConfig, PretrainedConfig
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

TEXT = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}

LLAMAS: dict[str, PretrainedConfig] = {
    # huggingface.co/meta-llama/Llama-3.2-1B-Instruct
    "1b": LlamaConfig(
        **TEXT, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, head_dim=64,
        tie_word_embeddings=True,
    ),
    # huggingface.co/meta-llama/Llama-3.2-3B-Instruct
    "3b": LlamaConfig(
        **TEXT, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, head_dim=128,
        tie_word_embeddings=True,
    ),
    # huggingface.co/meta-llama/Llama-3.1-8B-Instruct
    "8b": LlamaConfig(
        **TEXT, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        tie_word_embeddings=False,
    ),
    # huggingface.co/meta-llama/Llama-3.2-11B-Vision-Instruct
    "11b_vision": MllamaConfig(
        text_config=MllamaTextConfig(
            **TEXT, hidden_size=4096, intermediate_size=14336, num_hidden_layers=40, num_attention_heads=32,
            cross_attention_layers=[3, 8, 13, 18, 23, 28, 33, 38],
        ),
        vision_config=MllamaVisionConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_global_layers=8, attention_heads=16,
            image_size=560, patch_size=14, max_num_tiles=4, vision_output_dim=7680,
        ),
    ),
}  # fmt: skip

PARAMETERS = {"1b": 1_235_814_400, "3b": 3_212_749_824, "8b": 8_030_261_248, "11b_vision": 10_670_220_835}
"""Number of parameters, as the Hub counts them in the safetensors files."""
