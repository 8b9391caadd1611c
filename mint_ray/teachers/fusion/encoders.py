"""Published encoders of images and texts, from pixels and tokens to one vector each."""

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
from mint_ray.models.pretrained import place_of
from mint_ray.teachers.config import Augmentation, FusionImage, FusionJoint, FusionText, LanguageBlock
from mint_ray.teachers.fusion.augmentation import Look

Tensor = torch.Tensor

TOKENS_PER_STEP = 32
"""Texts are padded to a multiple of this, which depends on the text alone."""


def look_of(config: FusionImage | FusionJoint) -> Look:
    """How the encoder wants its images: what its preprocessor_config.json says, or for a timm model its config.json."""
    place = place_of(config.model_id, "vision")
    said = _read_json(place, config.revision, "preprocessor_config.json")
    if said is None:
        model = _read_json(place, config.revision, "config.json") or {}
        timm = model.get("pretrained_cfg")
        if timm is None:
            raise UserError(f"model_id: {config.model_id}: has no preprocessor_config.json, so nobody knows its images")
        said = {"size": timm["input_size"][-1], "image_mean": timm["mean"], "image_std": timm["std"]}
    size, fit = _size(said)
    return Look(
        Frame(size=size, fit=fit, max_bytes=config.max_bytes, max_pixels=config.max_pixels),
        tuple(said.get("image_mean") or (0.5, 0.5, 0.5)),
        tuple(said.get("image_std") or (0.5, 0.5, 0.5)),
    )


class ImageEncoder(nn.Module):
    """(B, size, size, 3) bytes to (B, width)."""

    def __init__(self, config: FusionImage, look: Look) -> None:
        super().__init__()
        self.pooling, self.look = config.pooling, look
        model = _load(config.model_id, config.revision, "vision")
        # of a CLIP its vision tower alone
        model = getattr(model, "vision_model", model)
        self.model = model.to(memory_format=torch.channels_last)
        choose_weights(self.model, config.train)
        if config.language_block is not None:
            if config.pooling == "model":
                raise UserError("pooling: a language block changes the tokens, so that the model's own pooling is none")
            self.block: LanguageLayer | None = LanguageLayer(config.language_block, self._tokens(1).shape[-1])
        else:
            self.block = None

    @property
    def learns(self) -> bool:
        return any(weight.requires_grad for weight in self.parameters())

    def forward(self, pixels: Tensor, draws: Tensor | None = None, how: Augmentation | None = None) -> Tensor:
        images = self.look.prepare(pixels, draws, how)
        if self.pooling == "model":
            pooled: Tensor = self.model(images).pooler_output.flatten(1)
            return pooled
        tokens = self._see(images)
        if self.block is not None:
            tokens = self.block(tokens)
        return tokens[:, 0] if self.pooling == "first" else tokens.mean(dim=1)

    def _see(self, images: Tensor) -> Tensor:
        """(B, tokens, channels)."""
        hidden: Tensor = self.model(images).last_hidden_state
        return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden

    @torch.no_grad()
    def _tokens(self, count: int) -> Tensor:
        size = self.look.frame.size
        return self._see(self.look.prepare(torch.zeros(count, size, size, 3, dtype=torch.uint8)))


class TextEncoder(nn.Module):
    """(B, T) tokens to (B, width)."""

    def __init__(self, config: FusionText) -> None:
        super().__init__()
        self.pooling = config.pooling
        self.tokens = Tokens(config.model_id, config.revision, config.max_length, "text")
        model = _load(config.model_id, config.revision, "text")
        self.model = getattr(model, "text_model", model)
        choose_weights(self.model, config.train)

    @property
    def learns(self) -> bool:
        return any(weight.requires_grad for weight in self.parameters())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "first":
            return hidden[:, 0]
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


class JointEncoder(nn.Module):
    """Pixels and tokens to one (B, width), by a model that attends across both; where one is missing it is empty."""

    def __init__(self, config: FusionJoint, look: Look) -> None:
        super().__init__()
        self.look = look
        self.tokens = Tokens(config.model_id, config.revision, config.max_length, "vision")
        self.model = _load(config.model_id, config.revision, "vision")
        choose_weights(self.model, config.train)

    @property
    def learns(self) -> bool:
        return any(weight.requires_grad for weight in self.parameters())

    def forward(
        self,
        pixels: Tensor,
        shown: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        draws: Tensor | None = None,
        how: Augmentation | None = None,
    ) -> Tensor:
        images = self.look.prepare(pixels, draws, how) * shown[:, None, None, None]
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=images,
            pixel_mask=torch.ones(images.shape[0], *images.shape[2:], dtype=torch.long, device=images.device),
        )
        first: Tensor = out.last_hidden_state[:, 0]
        return first


class LanguageLayer(nn.Module):
    """A linear layer, one frozen block of a language model, a linear layer: (B, T, width) to the same."""

    def __init__(self, config: LanguageBlock, width: int) -> None:
        super().__init__()
        self.rotary, self.block, hidden = load_block(config)
        self.into, self.out = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.into(tokens)
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        # tokens of an image have no before and after: no mask
        made = self.block(hidden, attention_mask=None, position_embeddings=self.rotary(hidden, position_ids=positions))
        hidden = made[0] if isinstance(made, tuple) else made
        out: Tensor = self.out(hidden)
        return out


class Tokens:
    """A tokenizer, and how its texts are padded."""

    def __init__(self, model_id: str, revision: str | None, max_length: int, use: Any) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(
            place_of(model_id, use), revision=revision, trust_remote_code=False
        )
        self.max_length = max_length
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def encode(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"])
        return ids or [self.tokenizer.pad_token_id]  # no model reads nothing

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Ids and mask, (rows, T) each: T is the longest row, up to the next multiple."""
        longest = max(len(row) for row in rows)
        length = min(-(-longest // TOKENS_PER_STEP) * TOKENS_PER_STEP, max(self.max_length, longest))
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[i, : len(row)] = 1
        return ids, mask

    def bucket(self, row: Sequence[int]) -> int:
        """Rows of one bucket are padded to one length."""
        return -(-len(row) // TOKENS_PER_STEP)


def choose_weights(model: nn.Module, train: str) -> None:
    """Let no weight learn, every weight, or those of the last blocks (`last:N`) and what follows them.

    Raises UserError when the model has no list of so many blocks.
    """
    for weight in model.parameters():
        weight.requires_grad_(train == "all")
    # normalisation and dropout stay as they were published: statistics of small batches would undo them
    model.eval()
    if not train.startswith("last:"):
        return
    wanted = int(train.removeprefix("last:"))
    stacks = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    name, stack = max(stacks, key=lambda item: sum(1 for _ in item[1].parameters()), default=("", nn.ModuleList()))
    if len(stack) < wanted:
        raise UserError(f"train: {train}: the encoder has {len(stack)} blocks")
    frozen = {id(weight) for block in list(stack)[: len(stack) - wanted] for weight in block.parameters()}
    reached = False
    for key, weight in model.named_parameters():
        reached = reached or key.startswith(f"{name}.")
        # what stands ahead of the blocks is frozen as well
        weight.requires_grad_(reached and id(weight) not in frozen)


def load_block(config: LanguageBlock) -> tuple[nn.Module, nn.Module, int]:
    """Rotary positions, the frozen block, its width; of the checkpoint only the block's tensors are read.

    Raises UserError if the model is not built like Llama, or has no such layer.
    """
    folder = Path(config.model_id).expanduser()
    place = str(folder) if folder.is_dir() else config.model_id
    known = AutoConfig.from_pretrained(place, revision=config.revision, trust_remote_code=False)
    count = known.num_hidden_layers
    if not -count <= config.layer < count:
        raise UserError(f"language_block.layer: {config.model_id} has {count} blocks, got {config.layer}")
    layer = config.layer % count
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(known, attn_implementation="sdpa").model
    if not hasattr(whole, "rotary_emb") or not hasattr(whole, "layers"):
        raise UserError(f"language_block.model_id: {config.model_id}: a {known.model_type} is not built like Llama")
    prefix = f"model.layers.{layer}."
    weights = {name.removeprefix(prefix): tensor for name, tensor in _tensors(place, config.revision, prefix)}
    block = whole.layers[layer].to_empty(device="cpu")
    block.load_state_dict(weights)
    block.float().eval()
    # full attention: an image is not read from left to right
    for module in block.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    for weight in block.parameters():
        weight.requires_grad_(False)
    return type(whole.rotary_emb)(config=known), block, known.hidden_size


def _tensors(place: str, revision: str | None, prefix: str) -> list[tuple[str, Tensor]]:
    index = _read_json(place, revision, "model.safetensors.index.json")
    files = ["model.safetensors"]
    if index is not None:
        files = sorted({file for name, file in index["weight_map"].items() if name.startswith(prefix)})
    found = []
    for file in files:
        path = _file(place, revision, file)
        if path is None:
            raise UserError(f"language_block.model_id: {place}: no {file}, and nothing else is read")
        with safe_open(path, framework="pt") as tensors:
            found += [(name, tensors.get_tensor(name)) for name in tensors.keys() if name.startswith(prefix)]  # noqa: SIM118
    return found


def _load(model_id: str, revision: str | None, use: Any) -> Any:
    return AutoModel.from_pretrained(
        place_of(model_id, use),
        revision=revision,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.float32,
    ).eval()


def _size(said: dict[str, Any]) -> tuple[int, Any]:
    """Side in pixels, and whether the image is cropped or squashed to it."""
    crop = said.get("crop_size") if said.get("do_center_crop") else None
    size = crop or said.get("size") or 224
    if isinstance(size, int):
        return size, "crop" if crop or "crop_pct" in said else "squash"
    if "shortest_edge" in size:
        return int(size["shortest_edge"]), "crop"
    return int(size["height"]), "crop" if crop else "squash"


def _read_json(place: str, revision: str | None, name: str) -> dict[str, Any] | None:
    path = _file(place, revision, name)
    return None if path is None else dict(json.loads(path.read_text(encoding="utf-8")))


def _file(place: str, revision: str | None, name: str) -> Path | None:
    """One file of a model, in its folder or fetched from the Hub; None where it has none."""
    if Path(place).is_dir():
        path = Path(place) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(place, name, revision=revision))
    except EntryNotFoundError:
        return None
