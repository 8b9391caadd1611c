"""Vision-language students of two layers, one of each family, with random weights and processors; and images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    Idefics3Config,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    MllamaConfig,
    MllamaImageProcessor,
    MllamaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from tests.tiny import SIZES, tiny_tokenizer

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE_TOKEN\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{{ '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The chat template of `tests.tiny`, for messages made of parts."""

SIDE, PATCH = 32, 8
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MEAN = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def _llava() -> tuple[Any, Any]:
    tokenizer = _tokenizer("<image>")
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=_template("<image>"),
    )  # fmt: skip
    config = LlavaConfig(
        # dropout, which must stay off in a frozen tower
        vision_config=CLIPVisionConfig(**TOWER, image_size=SIDE, patch_size=PATCH, attention_dropout=0.5),
        text_config=LlamaConfig(**_text(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    return config, processor


def _idefics3(config: type[Any] = Idefics3Config) -> tuple[Any, Any]:
    """An image is cut into tiles, whose number depends on its shape; each takes the same number of tokens."""
    rows = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    tokenizer = _tokenizer("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *rows)
    images = Idefics3ImageProcessor(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}, **MEAN)
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=_template("<image>"))
    model_config = config(
        vision_config=TOWER | {"image_size": SIDE, "patch_size": PATCH},
        text_config=LlamaConfig(**_text(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return model_config, processor


class ImagesOnly(Qwen2VLProcessor):  # type: ignore[misc]
    """Qwen's processor without its video processor, which needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def _qwen(config: type[Any], vision: dict[str, Any]) -> tuple[Any, Any]:
    """Tokens on a grid of the image's own shape, with positions on three axes."""
    words = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = _tokenizer(*words)
    images = Qwen2VLImageProcessor(
        patch_size=PATCH, merge_size=2, min_pixels=16 * 16, max_pixels=64 * 64, temporal_patch_size=2
    )
    processor = ImagesOnly(images, tokenizer, chat_template=_template("<|vision_start|><|image_pad|><|vision_end|>"))
    ids = dict(zip(words, tokenizer.convert_tokens_to_ids(words), strict=True))
    model_config = config(
        vision_config=vision | {"patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 2},
        text_config=_text(tokenizer, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    return model_config, processor


def _gemma3() -> tuple[Any, Any]:
    """Attention among an image's tokens is bidirectional; every second layer has a window shorter than any prompt."""
    tokenizer = _tokenizer("<start_of_image>", "<end_of_image>", "<image_soft_token>")
    for name, word in (("boi", "<start_of_image>"), ("eoi", "<end_of_image>"), ("image", "<image_soft_token>")):
        tokenizer._set_model_specific_special_tokens({f"{name}_token": word})
    images = Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE}, **MEAN)
    processor = Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=_template("<start_of_image>"))
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**TOWER, image_size=SIDE, patch_size=PATCH),
        text_config=Gemma3TextConfig(
            **_text(tokenizer, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
        ),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
    )
    return config, processor


def _mllama() -> tuple[Any, Any]:
    """Cross-attention to images in the second of three layers; an image has one to four tiles."""
    tokenizer = _tokenizer("<|image|>", "<|python_tag|>")
    images = MllamaImageProcessor(size={"height": SIDE, "width": SIDE}, max_image_tiles=4, **MEAN)
    processor = MllamaProcessor(images, tokenizer, chat_template=_template("<|image|>"))
    sizes = _text(tokenizer, num_hidden_layers=3, cross_attention_layers=[1])
    # the input embeddings have eight more rows than the LM head, one of them for the image token
    token = tokenizer.convert_tokens_to_ids("<|image|>")
    config = MllamaConfig(
        vision_config=MllamaVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_global_layers=1, attention_heads=2,
            image_size=SIDE, patch_size=PATCH, max_num_tiles=4, vision_output_dim=32, intermediate_layers_indices=[0],
        ),
        text_config=MllamaTextConfig(**sizes | {"vocab_size": token, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        image_token_index=token,
    )  # fmt: skip
    return config, processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": _llava,
    "idefics3": _idefics3,
    "smolvlm": lambda: _idefics3(SmolVLMConfig),
    "qwen2_vl": lambda: _qwen(
        Qwen2VLConfig, {"embed_dim": 16, "num_heads": 2, "hidden_size": SIZES["hidden_size"], "mlp_ratio": 2}
    ),
    "qwen2_5_vl": lambda: _qwen(
        Qwen2_5_VLConfig,
        {
            "hidden_size": 16, "num_heads": 2, "out_hidden_size": SIZES["hidden_size"], "intermediate_size": 32,
            "fullatt_block_indexes": [1], "window_size": 32,
        },
    ),
    "gemma3": _gemma3,
    "mllama": _mllama,
}  # fmt: skip
"""Families that differ in how an image enters the prompt, in positions, masks or attention."""


def tiny_vlm(family: str, seed: int = 0) -> tuple[Any, Any]:
    """Return a model for images and text in float32, with two layers and hidden size 32, and its processor."""
    config, processor = FAMILIES[family]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
        text = model.get_decoder()
        text_weights = {id(weight) for weight in [*text.parameters(), *model.lm_head.parameters()]}
        with torch.no_grad():
            for name, weight in model.named_parameters():
                # as initialized, gates are closed and towers give all images nearly the same features
                if "gate" in name and weight.numel() == 1:
                    weight.fill_(0.7)
                elif id(weight) not in text_weights and weight.dim() > 1:
                    weight.normal_(std=0.3)
    return model, processor


def save_tiny_vlm(path: Path | str, family: str = "llava", seed: int = 0) -> Path:
    """Write model and processor to the folder `path`, for `from_pretrained`."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    model, processor = tiny_vlm(family, seed)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def noise(seed: int, height: int = 40, width: int = 48) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return an image of noise around a random color."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, 3) * 0.7 + rng.integers(0, 256, (height, width, 3)) * 0.3
    return pixels.astype(np.uint8)


def save_image(path: Path | str, seed: int, height: int = 40, width: int = 48) -> str:
    """Write `noise` as a PNG file."""
    Image.fromarray(noise(seed, height, width)).save(path)
    return str(path)


def _tokenizer(*special_tokens: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *special_tokens]})
    return tokenizer


def _template(image_token: str) -> str:
    return TEMPLATE.replace("IMAGE_TOKEN", image_token)


def _text(tokenizer: Any, **changes: Any) -> dict[str, Any]:
    return SIZES | {"vocab_size": len(tokenizer)} | changes
