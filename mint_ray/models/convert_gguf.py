"""Conversion of a GGUF file to a folder of float32 safetensors, which training needs."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mint_ray.config.loader import UserError


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write model and tokenizer of `gguf` to `folder`; tied embeddings stay tied.

    Raises:
        UserError: The tokenizer in the file has no chat template or no EOS token.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    if not tokenizer.chat_template or tokenizer.eos_token is None:
        raise UserError(f"{gguf.name}: its tokenizer has no chat template or no EOS token")
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers marks a model loaded from GGUF as quantized and refuses to save it, although its weights are float32
    dropped = {"quantization_config", "_name_or_path", "_model_name_or_path"}
    plain = {key: value for key, value in loaded.config.to_dict().items() if key not in dropped}
    config = type(loaded.config).from_dict(plain)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
