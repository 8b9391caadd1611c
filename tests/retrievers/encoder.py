"""A two-layer sentence encoder with random weights, and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from tests.tiny import tiny_tokenizer


def save_tiny_encoder(folder: Path) -> Path:
    """Write an encoder to `folder`, in the format of `from_pretrained`, and return the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=512,
        )  # fmt: skip
        BertModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
