"""Turn a GGUF file into the folder of float32 safetensors that training needs."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mint_ray.config.loader import UserError


def dequantize(gguf: Path, folder: Path) -> None:
    """Write model and tokenizer of `gguf` into `folder`; tied embeddings stay tied.

    Raises UserError if the tokenizer in the file lacks a chat template or an end token.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    if not tokenizer.chat_template or tokenizer.eos_token is None:
        raise UserError(f"{gguf.name}: its tokenizer has no chat template or no end token")
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers calls a model that came from GGUF quantised and refuses to save it, though its weights are plain
    dropped = {"quantization_config", "_name_or_path", "_model_name_or_path"}
    plain = {key: value for key, value in loaded.config.to_dict().items() if key not in dropped}
    config = type(loaded.config).from_dict(plain)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
