"""A text student of two layers with random weights and its own tokenizer, which loads in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The chat template of SmolLM2, without its default system message."""

CORPUS = [
    "You are a genetic counsellor. Which diseases fit this case best?",
    "A boy of four years with short stature, seizures and a broad nasal bridge was seen at the clinic.",
    "1. Noonan syndrome 2. Marfan syndrome 3. Kabuki syndrome 4. Williams syndrome 5. Rett syndrome",
    "The most likely tissues are liver, kidney, breast, colon, lung and skin.",
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most 400 tokens, which can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}

FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "gemma": (GemmaConfig, {"head_dim": 8}),
    # a window shorter than any prompt, in every second layer or in all
    "gemma3": (
        Gemma3TextConfig,
        {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mistral": (MistralConfig, {"head_dim": 8, "sliding_window": 4}),
    # logits transformed after the LM head
    "granite": (GraniteConfig, {"logits_scaling": 3.0}),
    "gemma2": (Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 2.0, "attn_logit_softcapping": None}),
}
"""Model families that differ in norms, masks, positions or LM head."""


def tiny_model(seed: int = 0, family: str = "llama", **changes: Any) -> Any:
    """Return a causal model in float32 with two layers, hidden size 32 and random weights; `changes` apply to its config."""
    config, options = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config(**SIZES | options | changes))


def save_tiny_student(path: Path | str, seed: int = 0) -> Path:
    """Write the tiny model and its tokenizer to the folder `path`, for `from_pretrained`."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tiny_model(seed).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
