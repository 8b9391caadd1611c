"""Construction of a vision-language student from a vision encoder, a language model, and a projector between them.

The architecture is LLaVA's (arXiv 2304.08485): the projector maps the encoder's features of an image to tokens in the
prompt. Only the projector is new. It is trained on captions first, while encoder and language model are frozen.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    get_cosine_schedule_with_warmup,
)

from mint_ray.config.loader import UserError
from mint_ray.images import ImageError, Pixels, read_images_ahead
from mint_ray.models.pretrained import PretrainedModel
from mint_ray.models.vision_processor import FRAME
from mint_ray.models.vision_towers import ConvolutionalTower, ConvolutionalTowerConfig, register_vision_towers

IMAGE_TOKEN = "<image>"  # noqa: S105 -- no password
FLATTEN = """
{%- set turns = namespace(all=[]) -%}
{%- for message in messages -%}
  {%- set turn = namespace(text='') -%}
  {%- if message['content'] is string -%}
    {%- set turn.text = message['content'] -%}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' -%}
        {%- set turn.text = turn.text + '<image>\\n' -%}
      {%- else -%}
        {%- set turn.text = turn.text + part['text'] -%}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set turns.all = turns.all + [{'role': message['role'], 'content': turn.text}] -%}
{%- endfor -%}
{%- set messages = turns.all -%}
"""
"""Prefix of a chat template for text: converts messages made of parts to text that contains the image token."""
WARMUP_RATIO = 0.03
"""Share of the steps in which the learning rate increases, as in LLaVA."""


def build_llava(encoder: PretrainedModel, language_model: PretrainedModel, seed: int) -> tuple[Any, Any]:
    """Return a LLaVA model in float32 made of the two models, and its processor.

    Args:
        encoder: The vision encoder.
        language_model: The language model; a chat model.
        seed: Seed of the projector's random weights.

    Raises:
        UserError: The encoder's images differ in size, or its features are neither a sequence nor a map; or the
            language model has no chat template, or transforms its logits as LLaVA does not.
    """
    register_vision_towers()
    image_processor = _load(AutoImageProcessor, encoder, backend="pil")
    pixels = _blank_image(image_processor, encoder)
    tower = _load_tower(encoder, pixels)
    features = _features(tower, pixels)
    tokenizer = _load_tokenizer(language_model)
    text_model = _load(AutoModelForCausalLM, language_model, use_safetensors=True, dtype=torch.float32).eval()
    _add_image_token(text_model, tokenizer)
    num_tokens, hidden_size = features.shape[1:]
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=num_tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=text_model.config.tie_word_embeddings,
    )
    if getattr(tower.config, "hidden_size", None) != hidden_size:
        raise UserError(
            f"model_id: {encoder.model_id}: its features have {hidden_size} channels, but its config says otherwise"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vlm = LlavaForConditionalGeneration(config).eval()
    vlm.model.vision_tower.load_state_dict(tower.state_dict())
    vlm.model.language_model.load_state_dict(text_model.base_model.state_dict())
    vlm.lm_head.load_state_dict(text_model.get_output_embeddings().state_dict())
    vlm.tie_weights()
    vlm.generation_config = text_model.generation_config
    _check_same_logits(vlm, text_model, language_model)
    height, width = pixels.shape[2:]
    patch = max(1, height // math.isqrt(num_tokens))
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="full",
        # the processor assumes one token per patch; an encoder may have more, such as a CLS token
        num_additional_image_tokens=num_tokens - (height // patch) * (width // patch),
        chat_template=FLATTEN.strip() + tokenizer.chat_template,
    )
    return vlm, processor


def save_vlm(model: Any, processor: Any, folder: Path) -> None:
    """Write safetensors, processor and tokenizer, as `from_pretrained` reads them."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Caption:
    """An image by URI, and its caption."""

    image_uri: str
    text: str


CaptionImages = Callable[[Iterable[Caption]], Iterator[tuple[Caption, Pixels]]]
"""A function that yields each caption with its decoded image, in order."""
OnBatch = Callable[[int], None]
"""A function that is called after each batch with its number of captions."""


def read_caption_images(captions: Iterable[Caption]) -> Iterator[tuple[Caption, Pixels]]:
    """Yield each caption with its decoded image, reading ahead. Raises ImageError for an image that cannot be read."""
    for caption, pixels in read_images_ahead(captions, FRAME, lambda caption: caption.image_uri):
        if isinstance(pixels, ImageError):
            raise pixels
        if pixels is not None:
            yield caption, pixels


def readable_captions(captions: Iterable[Caption]) -> tuple[list[Caption], Counter[str]]:
    """Return the captions whose images can be read, and the number of the others by reason."""
    readable: list[Caption] = []
    dropped: Counter[str] = Counter()
    for caption, pixels in read_images_ahead(captions, FRAME, lambda caption: caption.image_uri):
        if isinstance(pixels, ImageError):
            dropped[pixels.reason] += 1
        else:
            readable.append(caption)
    return readable, dropped


class CaptionLoss:
    """The loss of captions: question and image are the prompt, the caption is the completion."""

    def __init__(
        self, model: Any, processor: Any, question: str, read_images: CaptionImages = read_caption_images
    ) -> None:
        self.model, self.processor, self.read_images = model, processor, read_images
        conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        blank = np.zeros((8, 8, 3), dtype=np.uint8)
        # the template has already added BOS
        self.prompt_ids: list[int] = processor(text=[text], images=[blank], add_special_tokens=False)["input_ids"][0]

    def batches(self, captions: Iterable[Caption], batch_size: int) -> Iterator[list[tuple[Caption, Pixels]]]:
        """Yield batches of captions with their decoded images."""
        images = self.read_images(captions)
        while batch := list(islice(images, batch_size)):
            yield batch

    def loss(self, batch: Sequence[tuple[Caption, Pixels]]) -> torch.Tensor:
        """Return the mean negative log-likelihood of the captions' tokens, EOS included."""
        tokenizer, device = self.processor.tokenizer, self.model.device
        texts = [
            [*tokenizer(caption.text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            for caption, _ in batch
        ]
        longest, start = max(map(len, texts)), len(self.prompt_ids)
        ids_BT = torch.full((len(texts), start + longest), tokenizer.pad_token_id, device=device)
        target_BL = torch.full((len(texts), longest), -100, device=device)
        mask_BT = torch.zeros_like(ids_BT)
        for row, text in enumerate(texts):
            ids_BT[row, :start] = torch.tensor(self.prompt_ids)
            ids_BT[row, start : start + len(text)] = target_BL[row, : len(text)] = torch.tensor(text)
            mask_BT[row, : start + len(text)] = 1
        images = [pixels for _, pixels in batch]
        pixels_BCHW = self.processor.image_processor(images, return_tensors="pt")["pixel_values"].to(device)
        # the logits that predict a caption's tokens: one position earlier, so the last is not needed
        logits_BLV = self.model(
            input_ids=ids_BT, attention_mask=mask_BT, pixel_values=pixels_BCHW, logits_to_keep=longest + 1
        ).logits[:, :-1]
        return functional.cross_entropy(logits_BLV.flatten(0, 1).float(), target_BL.flatten())

    @torch.no_grad()
    def mean_loss(self, captions: Sequence[Caption], batch_size: int, on_batch: OnBatch = lambda _: None) -> float:
        """Return the mean of `loss` over batches, weighted by their number of captions."""
        total = 0.0
        for batch in self.batches(captions, batch_size):
            total += float(self.loss(batch)) * len(batch)
            on_batch(len(batch))
        return total / len(captions)


def num_steps(epochs: float, num_captions: int, batch_size: int) -> int:
    """Return the number of optimizer steps of `train_projector`."""
    return max(1, round(epochs * num_captions / batch_size))


def train_projector(
    objective: CaptionLoss,
    train: Sequence[Caption],
    *,
    learning_rate: float,
    epochs: float,
    batch_size: int,
    seed: int,
    on_batch: OnBatch = lambda _: None,
) -> None:
    """Train the projector in place; vision tower and language model are frozen."""
    model = objective.model
    model.requires_grad_(False)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=learning_rate, weight_decay=0.0)
    steps = num_steps(epochs, len(train), batch_size)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, round(WARMUP_RATIO * steps)), steps)
    for batch in objective.batches(_training_order(train, seed, steps, batch_size), batch_size):
        torch.autograd.backward(objective.loss(batch))
        torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        on_batch(batch_size)
    model.requires_grad_(True)


def _training_order(train: Sequence[Caption], seed: int, steps: int, batch_size: int) -> Iterator[Caption]:
    """Yield the captions of all steps: epoch after epoch, each shuffled by itself."""
    waiting: list[Caption] = []
    for step in range(steps):
        while len(waiting) < batch_size:
            waiting += random.Random(f"{seed}:{step}").sample(train, len(train))
        yield from waiting[:batch_size]
        waiting = waiting[batch_size:]


def _load(auto_class: Any, model: PretrainedModel, **options: Any) -> Any:
    return auto_class.from_pretrained(model.path, revision=model.revision, trust_remote_code=False, **options)


def _add_image_token(model: Any, tokenizer: Any) -> None:
    """Add the image token to the tokenizer and, if there is no unused row, to the model's embeddings."""
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        # the new input embedding is never used, because image features replace it; as the mean of all rows, the new
        # output embedding gives the token an average likelihood
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
            layer.weight.data[len(tokenizer) - 1] = layer.weight.data[: len(tokenizer) - 1].mean(0)


def _blank_image(image_processor: Any, encoder: PretrainedModel) -> torch.Tensor:
    """Return a black image as the encoder takes it. Raises UserError if a wide one has another size."""
    shapes = [(64, 64, 3), (64, 128, 3)]
    outputs = [image_processor([np.zeros(shape, np.uint8)], return_tensors="pt")["pixel_values"] for shape in shapes]
    if outputs[0].dim() != 4 or outputs[0].shape != outputs[1].shape:
        raise UserError(
            f"model_id: {encoder.model_id}: its images differ in size, so the number of their tokens would vary"
        )
    blank: torch.Tensor = outputs[0]
    return blank


def _load_tower(encoder: PretrainedModel, pixels: torch.Tensor) -> Any:
    """Return the encoder as a vision tower; a network with a feature map is wrapped."""
    model = _load(AutoModel, encoder, use_safetensors=True, dtype=torch.float32).eval()
    if hasattr(model.config, "vision_config"):
        # only the vision tower of a CLIP model
        vision_model = model.vision_model
        model = AutoModel.from_config(model.config.vision_config, dtype=torch.float32).eval()
        getattr(model, "vision_model", model).load_state_dict(vision_model.state_dict())
    with torch.no_grad():
        features = model(pixels).last_hidden_state
    if features.dim() != 4:
        return model
    tower = ConvolutionalTower(ConvolutionalTowerConfig(network_config=model.config, hidden_size=features.shape[1]))
    tower.network.load_state_dict(model.state_dict())
    return tower.eval()


@torch.no_grad()
def _features(tower: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Return the features (1, tokens, channels) that LLaVA projects."""
    features: torch.Tensor = tower(pixels, output_hidden_states=True, return_dict=True).hidden_states[-1]
    if features.dim() != 3:
        raise UserError(f"model_id: its features have the shape {tuple(features.shape)}; expected tokens or a map")
    return features


def _load_tokenizer(language_model: PretrainedModel) -> Any:
    tokenizer = _load(AutoTokenizer, language_model)
    if not tokenizer.chat_template or tokenizer.eos_token is None:
        missing = "no EOS token" if tokenizer.chat_template else "no chat template; use an instruct model"
        raise UserError(f"model_id: {language_model.model_id}: its tokenizer has {missing}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@torch.no_grad()
def _check_same_logits(vlm: Any, text_model: Any, language_model: PretrainedModel) -> None:
    """Raise UserError unless both models give a text without images the same logits."""
    ids = torch.arange(8)[None]
    if not torch.allclose(vlm(input_ids=ids).logits, text_model(input_ids=ids).logits, atol=1e-4, rtol=1e-4):
        raise UserError(f"model_id: {language_model.model_id}: transforms its logits, which LLaVA does not")
