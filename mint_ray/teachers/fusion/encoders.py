"""Pretrained encoders of images and texts: from pixels and tokens to one feature vector."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from mint_ray.config.loader import UserError
from mint_ray.images import Frame
from mint_ray.models.bundled import Use
from mint_ray.models.pretrained import PretrainedModel, resolve_model
from mint_ray.teachers.config import Augmentation, FusionImage, FusionJoint, FusionText, LanguageBlock
from mint_ray.teachers.fusion.augmentation import ImagePreprocessor

Tensor = torch.Tensor

PAD_MULTIPLE = 32
"""Texts are padded to a multiple of this number of tokens, which depends on the text alone."""


def load_preprocessor(config: FusionImage | FusionJoint) -> ImagePreprocessor:
    """Return the preprocessor that an encoder was trained with.

    It is read from `preprocessor_config.json`, or from the `config.json` of a timm model.

    Raises:
        UserError: The model has neither.
    """
    model = resolve_model(config, "vision")
    settings = _read_json(model, "preprocessor_config.json")
    if settings is None:
        timm = (_read_json(model, "config.json") or {}).get("pretrained_cfg")
        if timm is None:
            raise UserError(f"model_id: {config.model_id}: no preprocessor_config.json, which image encoders need")
        settings = {"size": timm["input_size"][-1], "image_mean": timm["mean"], "image_std": timm["std"]}
    size, fit = _read_size(settings)
    return ImagePreprocessor(
        Frame(size=size, fit=fit, max_bytes=config.max_bytes, max_pixels=config.max_pixels),
        tuple(settings.get("image_mean") or (0.5, 0.5, 0.5)),
        tuple(settings.get("image_std") or (0.5, 0.5, 0.5)),
    )


class Encoder(nn.Module):
    """Base class of the encoders."""

    @property
    def is_trainable(self) -> bool:
        """True if any weight is trained."""
        return any(weight.requires_grad for weight in self.parameters())


class ImageEncoder(Encoder):
    """Encoder of images: (B, size, size, 3) bytes to features (B, D)."""

    def __init__(self, config: FusionImage, preprocessor: ImagePreprocessor) -> None:
        super().__init__()
        self.pooling, self.preprocessor = config.pooling, preprocessor
        model = _load_model(config, "vision")
        # the vision tower of a CLIP
        model = getattr(model, "vision_model", model)
        self.model = model.to(memory_format=torch.channels_last)
        set_trainable(self.model, config.trainable)
        self.block: LanguageLayer | None = None
        if config.language_block is not None:
            if config.pooling == "pooler":
                raise UserError("pooling: pooler cannot be used with language_block, which changes the tokens")
            self.block = LanguageLayer(config.language_block, self._blank_tokens().shape[-1])

    def forward(self, pixels: Tensor, draws: Tensor | None = None, augmentation: Augmentation | None = None) -> Tensor:
        """Return features (B, D); arguments as for `ImagePreprocessor`."""
        images = self.preprocessor(pixels, draws, augmentation)
        if self.pooling == "pooler":
            pooled: Tensor = self.model(images).pooler_output.flatten(1)
            return pooled
        tokens = self._encode_tokens(images)
        if self.block is not None:
            tokens = self.block(tokens)
        return tokens[:, 0] if self.pooling == "cls" else tokens.mean(dim=1)

    def _encode_tokens(self, images: Tensor) -> Tensor:
        """Return (B, tokens, channels)."""
        hidden: Tensor = self.model(images).last_hidden_state
        return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden

    @torch.no_grad()
    def _blank_tokens(self) -> Tensor:
        size = self.preprocessor.frame.size
        return self._encode_tokens(self.preprocessor(torch.zeros(1, size, size, 3, dtype=torch.uint8)))


class TextEncoder(Encoder):
    """Encoder of texts: (B, T) tokens to features (B, D)."""

    def __init__(self, config: FusionText) -> None:
        super().__init__()
        self.pooling = config.pooling
        self.tokenizer = PaddingTokenizer(config, "text")
        model = _load_model(config, "text")
        self.model = getattr(model, "text_model", model)
        set_trainable(self.model, config.trainable)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return features (B, D)."""
        hidden: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "cls":
            return hidden[:, 0]
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


class JointEncoder(Encoder):
    """Encoder that attends across image and text: pixels and tokens to features (B, D). Either may be missing."""

    def __init__(self, config: FusionJoint, preprocessor: ImagePreprocessor) -> None:
        super().__init__()
        self.preprocessor = preprocessor
        self.tokenizer = PaddingTokenizer(config, "vision")
        self.model = _load_model(config, "vision")
        set_trainable(self.model, config.trainable)

    def forward(
        self,
        pixels: Tensor,
        has_image: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        draws: Tensor | None = None,
        augmentation: Augmentation | None = None,
    ) -> Tensor:
        """Return features (B, D); `has_image` (B,) is False for rows whose image is missing and set to zeros."""
        images = self.preprocessor(pixels, draws, augmentation) * has_image[:, None, None, None]
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=images,
            pixel_mask=torch.ones(images.shape[0], *images.shape[2:], dtype=torch.long, device=images.device),
        )
        first: Tensor = out.last_hidden_state[:, 0]
        return first


class LanguageLayer(nn.Module):
    """A trained linear layer, a frozen block of a language model, a trained linear layer: (B, T, D) to (B, T, D)."""

    def __init__(self, config: LanguageBlock, feature_size: int) -> None:
        super().__init__()
        self.rotary, self.block, hidden_size = load_block(config)
        self.input_projection = nn.Linear(feature_size, hidden_size)
        self.output_projection = nn.Linear(hidden_size, feature_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        hidden = self.input_projection(tokens)
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        # image tokens have no causal order: no mask
        out = self.block(hidden, attention_mask=None, position_embeddings=self.rotary(hidden, position_ids=positions))
        hidden = out[0] if isinstance(out, tuple) else out
        projected: Tensor = self.output_projection(hidden)
        return projected


class PaddingTokenizer:
    """A tokenizer that pads texts to lengths that do not depend on the batch."""

    def __init__(self, config: FusionText | FusionJoint, use: Use) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(
            resolve_model(config, use).path, revision=config.revision, trust_remote_code=False
        )
        self.max_length = config.max_length
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def encode(self, text: str) -> list[int]:
        """Return token ids, truncated to `max_length`."""
        ids = list(self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"])
        return ids or [self.tokenizer.pad_token_id]  # models reject an empty sequence

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return ids and attention mask, each (rows, T): T is the longest row, rounded up to a multiple."""
        longest = max(len(row) for row in rows)
        length = min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, max(self.max_length, longest))
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[i, : len(row)] = 1
        return ids, mask

    def length_bucket(self, row: Sequence[int]) -> int:
        """Return the bucket of a row; rows of one bucket are padded to one length."""
        return -(-len(row) // PAD_MULTIPLE)


def set_trainable(model: nn.Module, trainable: str) -> None:
    """Freeze all weights (`frozen`), none (`all`), or all but those from the last N blocks on (`last:N`).

    The model stays in evaluation mode: dropout is off and batch normalization keeps its published statistics, which
    small batches would spoil.

    Raises:
        UserError: The model has no list of N blocks.
    """
    for weight in model.parameters():
        weight.requires_grad_(trainable == "all")
    model.eval()
    if not trainable.startswith("last:"):
        return
    num_trainable = int(trainable.removeprefix("last:"))
    stacks = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    name, blocks = max(stacks, key=lambda item: sum(1 for _ in item[1].parameters()), default=("", nn.ModuleList()))
    if len(blocks) < num_trainable:
        raise UserError(f"trainable: {trainable}: the encoder has {len(blocks)} blocks")
    frozen = {id(weight) for block in list(blocks)[: len(blocks) - num_trainable] for weight in block.parameters()}
    reached_blocks = False
    for key, weight in model.named_parameters():
        # embeddings and other layers ahead of the blocks stay frozen
        reached_blocks = reached_blocks or key.startswith(f"{name}.")
        weight.requires_grad_(reached_blocks and id(weight) not in frozen)


def load_block(config: LanguageBlock) -> tuple[nn.Module, nn.Module, int]:
    """Return rotary embedding, frozen block and hidden size; only the block's tensors are read from the checkpoint.

    Raises:
        UserError: The model does not have Llama's structure, or has no such layer.
    """
    source = resolve_model(config, "other")
    model_config = AutoConfig.from_pretrained(source.path, revision=source.revision, trust_remote_code=False)
    num_layers = model_config.num_hidden_layers
    if not -num_layers <= config.layer < num_layers:
        raise UserError(f"language_block.layer: {config.model_id} has {num_layers} blocks, got {config.layer}")
    layer = config.layer % num_layers
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, attn_implementation="sdpa").model
    if not hasattr(model, "rotary_emb") or not hasattr(model, "layers"):
        raise UserError(
            f"language_block.model_id: {config.model_id}: a {model_config.model_type} model is not Llama-like"
        )
    prefix = f"model.layers.{layer}."
    weights = {name.removeprefix(prefix): tensor for name, tensor in _read_tensors(source, prefix)}
    block = model.layers[layer].to_empty(device="cpu")
    block.load_state_dict(weights)
    block.float().eval()
    # bidirectional attention: image tokens have no order
    for module in block.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    for weight in block.parameters():
        weight.requires_grad_(False)
    return type(model.rotary_emb)(config=model_config), block, model_config.hidden_size


def _read_tensors(model: PretrainedModel, prefix: str) -> list[tuple[str, Tensor]]:
    index = _read_json(model, "model.safetensors.index.json")
    files = ["model.safetensors"]
    if index is not None:
        files = sorted({file for name, file in index["weight_map"].items() if name.startswith(prefix)})
    found = []
    for file in files:
        path = _find_file(model, file)
        if path is None:
            raise UserError(f"language_block.model_id: {model.model_id}: no {file}; other formats are not read")
        with safe_open(path, framework="pt") as tensors:
            found += [(name, tensors.get_tensor(name)) for name in tensors.keys() if name.startswith(prefix)]  # noqa: SIM118
    return found


def _load_model(config: FusionImage | FusionText | FusionJoint, use: Use) -> Any:
    return AutoModel.from_pretrained(
        resolve_model(config, use).path,
        revision=config.revision,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.float32,
    ).eval()


def _read_size(settings: dict[str, Any]) -> tuple[int, Any]:
    """Return the side in pixels, and whether images are cropped or squashed to it."""
    crop = settings.get("crop_size") if settings.get("do_center_crop") else None
    size = crop or settings.get("size") or 224
    if isinstance(size, int):
        return size, "crop" if crop or "crop_pct" in settings else "squash"
    if "shortest_edge" in size:
        return int(size["shortest_edge"]), "crop"
    return int(size["height"]), "crop" if crop else "squash"


def _read_json(model: PretrainedModel, name: str) -> dict[str, Any] | None:
    path = _find_file(model, name)
    return None if path is None else dict(json.loads(path.read_text(encoding="utf-8")))


def _find_file(model: PretrainedModel, name: str) -> Path | None:
    """Return the path of a model's file, in its folder or downloaded from the Hub; None if it has no such file."""
    if Path(model.path).is_dir():
        path = Path(model.path) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(model.path, name, revision=model.revision))
    except EntryNotFoundError:
        return None
