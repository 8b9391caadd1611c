"""Tiny CLIP and SigLIP models with random weights and their own tokenizer, in the files of the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModel, CLIPConfig, PreTrainedTokenizerFast, SiglipConfig

SIZE, PATCH, TOKENS = 32, 8, 48

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = SIZES | {"image_size": SIZE, "patch_size": PATCH}
TEXT = SIZES | {"max_position_embeddings": TOKENS, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


def save_tiny_clip(path: Path, family: Literal["clip", "siglip"] = "clip", seed: int = 0) -> Path:
    """Save model, tokenizer and `preprocessor_config.json`, as `from_pretrained` reads them."""
    tokenizer = tiny_tokenizer(ends=family)
    text = TEXT | {"vocab_size": len(tokenizer)}
    config: Any
    if family == "clip":
        config = CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
        processor: dict[str, Any] = {"size": SIZE, "crop_size": SIZE, "do_center_crop": True}
    else:
        config = SiglipConfig(text_config=text | {"projection_size": 32}, vision_config=VISION)
        processor = {"size": {"height": SIZE, "width": SIZE}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(config)
        for parameter in model.parameters():  # the default weights are so small that all embeddings are alike
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        torch.nn.init.constant_(model.logit_scale, 2.0)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    common = {"do_resize": True, "do_normalize": True, "image_mean": MEAN, "image_std": STD, "resample": 3}
    kind = {"image_processor_type": "CLIPImageProcessor" if family == "clip" else "SiglipImageProcessor"}
    (path / "preprocessor_config.json").write_text(json.dumps(common | processor | kind))
    return path


def tiny_tokenizer(ends: Literal["clip", "siglip"]) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer; CLIP's adds a start and an end token, SigLIP's an end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<unk>", "<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["a photo of a melanoma, a photo of a nevus"], trainer)
    template = "<s> $A </s>" if ends == "clip" else "$A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 2), ("</s>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=TOKENS,
        # SigLIP's tokenizer has no attention mask: the padding is read too
        model_input_names=["input_ids", "attention_mask"] if ends == "clip" else ["input_ids"],
        clean_up_tokenization_spaces=False,
    )
