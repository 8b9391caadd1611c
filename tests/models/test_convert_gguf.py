"""Conversion of a GGUF file, written as llama.cpp writes it, to safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from mint_ray.config.loader import UserError
from mint_ray.models.convert_gguf import convert_gguf
from tests.tiny import tiny_model, tiny_tokenizer


def tied_model() -> LlamaForCausalLM:
    model = tiny_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def write_gguf(path: Path, model: LlamaForCausalLM, *, with_chat_template: bool = True) -> None:
    """Write a tiny model as llama.cpp does, in float32."""
    config, tokenizer = model.config, tiny_tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = set(tokenizer.all_special_tokens)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in special else 1 for token, _ in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    if with_chat_template:
        writer.add_chat_template(tokenizer.chat_template)
    weights = {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for theirs, ours in names.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            if theirs in heads:  # llama.cpp keeps the two halves of a rotary pair side by side
                split = weight.reshape(heads[theirs], 2, -1, weight.shape[1])
                weight = np.ascontiguousarray(split.swapaxes(1, 2).reshape(weight.shape))
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_converted_model_computes_the_same_logits(tmp_path: Path) -> None:
    original = tied_model()
    write_gguf(tmp_path / "tiny.gguf", original)
    folder = tmp_path / "model"
    convert_gguf(tmp_path / "tiny.gguf", folder)
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "A boy of four,  with seizures\nand «éü» 123"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids.tolist() == tiny_tokenizer()(text, return_tensors="pt")["input_ids"].tolist()
    assert tokenizer.decode(ids[0]) == text
    assert (tokenizer.chat_template, tokenizer.eos_token) == (tiny_tokenizer().chat_template, "<|im_end|>")
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_file_without_a_chat_template_is_rejected(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tied_model(), with_chat_template=False)
    with pytest.raises(UserError, match=r"tiny\.gguf: its tokenizer has no chat template"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
