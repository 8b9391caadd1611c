"""Make a student that sees of parts at hand: a vision encoder, a language model, and a projector between them.

The form is that of LLaVA (arXiv 2304.08485): what the encoder makes of an image stands in the prompt as so many tokens,
and of the whole only the projector is new. It is trained on captions first, everything else being held.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
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
from mint_ray.images import Pixels
from mint_ray.models.pretrained import Place
from mint_ray.models.vision_towers import MapTower, MapTowerConfig

IMAGE = "<image>"
FLATTEN = """
{%- set turns = namespace(all=[]) -%}
{%- for message in messages -%}
  {%- set said = namespace(text='') -%}
  {%- if message['content'] is string -%}
    {%- set said.text = message['content'] -%}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' -%}
        {%- set said.text = said.text + '<image>\\n' -%}
      {%- else -%}
        {%- set said.text = said.text + part['text'] -%}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set turns.all = turns.all + [{'role': message['role'], 'content': said.text}] -%}
{%- endfor -%}
{%- set messages = turns.all -%}
"""
"""Ahead of a chat template that knows text alone: turns made of parts become text with the image's token in it."""
WARMUP = 0.03
"""Share of the steps over which the learning rate rises, as LLaVA has it."""


def join_models(vision: Place, language: Place, seed: int) -> tuple[Any, Any]:
    """A Llava of both in float32, ready to be asked, and its processor; the projector is drawn by `seed`.

    Raises UserError for an encoder whose images are not all of one size or whose features are no row or map of tokens,
    and for a language model that has no chat template or does something to its logits that a Llava would not.
    """
    image_processor = _read(AutoImageProcessor, vision, backend="pil")
    pixels = _blank(image_processor, vision)
    tower = _load_tower(vision, pixels)
    features = _look(tower, pixels)
    tokenizer = _load_tokenizer(language)
    model = _read(AutoModelForCausalLM, language, use_safetensors=True, dtype=torch.float32).eval()
    if IMAGE not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]}, replace_extra_special_tokens=False)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        # the new row is never read, for an image stands there; as the mean of all it is as unlikely to be said as any
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
            layer.weight.data[len(tokenizer) - 1] = layer.weight.data[: len(tokenizer) - 1].mean(0)
    count, width = features.shape[1:]
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=count,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=model.config.tie_word_embeddings,
    )
    if getattr(tower.config, "hidden_size", None) != width:
        raise UserError(f"model_id: {vision.model_id}: its tokens have {width} numbers, which its config does not say")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        joined = LlavaForConditionalGeneration(config).eval()
    joined.model.vision_tower.load_state_dict(tower.state_dict())
    joined.model.language_model.load_state_dict(model.base_model.state_dict())
    joined.lm_head.load_state_dict(model.get_output_embeddings().state_dict())
    joined.tie_weights()
    joined.generation_config = model.generation_config
    _check_same(joined, model, language)
    height, breadth = pixels.shape[2:]
    patch = max(1, height // math.isqrt(count))
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="full",
        # the processor reckons one token for each patch; an encoder may have more, such as one for the whole image
        num_additional_image_tokens=count - (height // patch) * (breadth // patch),
        chat_template=FLATTEN.strip() + tokenizer.chat_template,
    )
    return joined, processor


def save_joined(model: Any, processor: Any, folder: Path) -> None:
    """Write safetensors, processor and tokenizer, as `from_pretrained` reads them."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Caption:
    """An image by URI, and what it shows."""

    image_uri: str
    name: str


class Captions:
    """Captions as the joined model reads them: question and image, and the name as the answer."""

    def __init__(self, model: Any, processor: Any, question: str, read: Callable[[str], Pixels]) -> None:
        self.model, self.processor, self.read = model, processor, read
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        blank = np.zeros((8, 8, 3), dtype=np.uint8)
        # the template has put there what begins a text
        read_as = processor(text=[text], images=[blank], add_special_tokens=False)
        self.prompt_ids: list[int] = read_as["input_ids"][0]

    def loss(self, captions: Sequence[Caption]) -> torch.Tensor:
        """Mean negative log-likelihood of the names' tokens, the end among them."""
        tokenizer, device = self.processor.tokenizer, self.model.device
        names = [
            [*tokenizer(one.name, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for one in captions
        ]
        longest, opening = max(map(len, names)), len(self.prompt_ids)
        ids_BT = torch.full((len(names), opening + longest), tokenizer.pad_token_id, device=device)
        target_BL = torch.full((len(names), longest), -100, device=device)
        mask_BT = torch.zeros_like(ids_BT)
        for row, name in enumerate(names):
            ids_BT[row, :opening] = torch.tensor(self.prompt_ids)
            ids_BT[row, opening : opening + len(name)] = target_BL[row, : len(name)] = torch.tensor(name)
            mask_BT[row, : opening + len(name)] = 1
        images = [self.read(one.image_uri) for one in captions]
        pixels_BCHW = self.processor.image_processor(images, return_tensors="pt")["pixel_values"].to(device)
        # the logits ahead of each token of a name: all but the last of them
        logits_BLV = self.model(
            input_ids=ids_BT, attention_mask=mask_BT, pixel_values=pixels_BCHW, logits_to_keep=longest + 1
        ).logits[:, :-1]
        return functional.cross_entropy(logits_BLV.flatten(0, 1).float(), target_BL.flatten())

    @torch.no_grad()
    def measure(
        self, captions: Sequence[Caption], batch_size: int, tell: Callable[[int], None] = lambda count: None
    ) -> float:
        """Mean of `loss` over all captions, each weighing the same. `tell(count)` is called of each batch."""
        summed = 0.0
        for start in range(0, len(captions), batch_size):
            batch = captions[start : start + batch_size]
            summed += float(self.loss(batch)) * len(batch)
            tell(len(batch))
        return summed / len(captions)


def steps_of(epochs: float, captions: int, batch_size: int) -> int:
    """Steps of `batch_size` captions that `train_projector` takes."""
    return max(1, round(epochs * captions / batch_size))


def train_projector(
    captions: Captions,
    train: Sequence[Caption],
    *,
    learning_rate: float,
    epochs: float,
    batch_size: int,
    seed: int,
    tell: Callable[[int], None] = lambda count: None,
) -> None:
    """Train the projector in place, tower and language model held. `tell(count)` is called of each batch."""
    model = captions.model
    model.requires_grad_(False)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=learning_rate, weight_decay=0.0)
    steps = steps_of(epochs, len(train), batch_size)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, round(WARMUP * steps)), steps)
    waiting: list[Caption] = []
    for step in range(steps):
        while len(waiting) < batch_size:
            # as many passes in orders of their own as the steps take
            waiting += random.Random(f"{seed}:{step}").sample(train, len(train))
        batch, waiting = waiting[:batch_size], waiting[batch_size:]
        torch.autograd.backward(captions.loss(batch))
        torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        tell(batch_size)
    model.requires_grad_(True)


def _read(auto: Any, place: Place, **options: Any) -> Any:
    return auto.from_pretrained(place.path, revision=place.revision, trust_remote_code=False, **options)


def _blank(image_processor: Any, vision: Place) -> torch.Tensor:
    """A black image as the encoder gets it. Raises UserError if a wide one would have another size."""
    shapes = [(64, 64, 3), (64, 128, 3)]
    made = [image_processor([np.zeros(shape, np.uint8)], return_tensors="pt")["pixel_values"] for shape in shapes]
    if made[0].dim() != 4 or made[0].shape != made[1].shape:
        raise UserError(f"model_id: {vision.model_id}: its images are not all of one size, so their tokens vary")
    blank: torch.Tensor = made[0]
    return blank


def _load_tower(vision: Place, pixels: torch.Tensor) -> Any:
    model = _read(AutoModel, vision, use_safetensors=True, dtype=torch.float32).eval()
    if hasattr(model.config, "vision_config"):
        # of a CLIP the tower alone
        whole = model.vision_model
        model = AutoModel.from_config(model.config.vision_config, dtype=torch.float32).eval()
        getattr(model, "vision_model", model).load_state_dict(whole.state_dict())
    with torch.no_grad():
        seen = model(pixels).last_hidden_state
    if seen.dim() != 4:
        return model
    tower = MapTower(MapTowerConfig(network_config=model.config, hidden_size=seen.shape[1]))
    tower.network.load_state_dict(model.state_dict())
    return tower.eval()


@torch.no_grad()
def _look(tower: Any, pixels: torch.Tensor) -> torch.Tensor:
    """(1, tokens, width), as a Llava takes them."""
    seen: torch.Tensor = tower(pixels, output_hidden_states=True, return_dict=True).hidden_states[-1]
    if seen.dim() != 3:
        raise UserError(f"model_id: its features have the shape {tuple(seen.shape)}; expected tokens or a map")
    return seen


def _load_tokenizer(language: Place) -> Any:
    tokenizer = _read(AutoTokenizer, language)
    if not tokenizer.chat_template or tokenizer.eos_token is None:
        lacks = "no end token" if tokenizer.chat_template else "no chat template; take an instruct model"
        raise UserError(f"model_id: {language.model_id}: its tokenizer has {lacks}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@torch.no_grad()
def _check_same(joined: Any, model: Any, language: Place) -> None:
    """Raise UserError unless text alone has the same logits in both."""
    ids = torch.arange(8)[None]
    if not torch.allclose(joined(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4):
        raise UserError(f"model_id: {language.model_id}: does something to its logits that a Llava does not")
