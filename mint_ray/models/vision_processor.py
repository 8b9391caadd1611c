"""What a model that sees reads with: its processor, which makes room for an image in a prompt, and tensors of it."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image as PillowImage
from transformers import AutoProcessor

from mint_ray.config.loader import UserError
from mint_ray.images import Frame, ImageError, Pixels, read_image
from mint_ray.layouts import Example, Image
from mint_ray.layouts.images import inner_model
from mint_ray.models.architectures import load_config
from mint_ray.models.pretrained import Place
from mint_ray.records import Message

logger = logging.getLogger(__name__)

FRAME = Frame(size=2048, fit="within")
"""No model looks closer; the processor scales the image from there to what its model takes."""

PROBE = np.linspace(0, 255, 64 * 64 * 3).astype(np.uint8).reshape(64, 64, 3)
"""An image that every worker has alike."""

OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask")
"""What a processor returns that tells of the text, which is tokenised elsewhere."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One image as a model is given it."""

    image: Image
    slot: str
    """The text that stands in a prompt for this very image."""
    tokens: int
    """Image tokens in it."""


class Sight:
    """The processor of a model that sees.

    Raises UserError for one without a chat template, or whose image token is not that of the model.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        try:
            processor = AutoProcessor.from_pretrained(place.path, revision=place.revision, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            hint = "pip install 'mint-ray[vision]': " if isinstance(error, ImportError) else ""
            raise UserError(
                f"model_id: {place.model_id}: no processor: {hint}{' '.join(str(error).split())}"
            ) from error
        if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
            raise UserError(
                f"model_id: {place.model_id}: {type(processor).__name__} is no processor of images and text"
            )
        self.processor: Any = processor
        self.tokenizer: Any = processor.tokenizer
        if self.tokenizer.eos_token is None:
            raise UserError(f"model_id: {place.model_id}: its tokenizer has no end token")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.template = processor.chat_template or self.tokenizer.chat_template
        if not self.template:
            raise UserError(f"model_id: {place.model_id}: its processor has no chat template; take an instruct model")
        self.word: str = processor.image_token
        self.token_id: int = processor.image_token_ids[0]
        wanted = load_config(place).image_token_id
        if self.token_id != wanted:
            raise UserError(
                f"model_id: {place.model_id}: its processor's image token is {self.token_id}, its model's is {wanted}"
            )
        self.folds_system = self._folds_system()

    def look(self, uri: str) -> View:
        """Read the image at `uri`. Raises ImageError as `images.read_image` does, or with reason `image_refused`."""
        return self.view(read_image(uri, FRAME), uri)

    def view(self, pixels: Pixels, name: str) -> View:
        """An image that is read already; `name` is what errors call it. Raises ImageError: `image_refused`."""
        images = [PillowImage.fromarray(pixels)]
        try:
            made = self.processor(images=images, text=[self.word], return_text_replacement_offsets=True)
        except ValueError as error:
            # such as Qwen's for an image two hundred times as long as it is wide
            raise ImageError("image_refused", f"{name}: {' '.join(str(error).split())}") from error
        offsets = made.pop("text_replacement_offsets", None)
        slot = offsets[0][0]["replacement"] if offsets else self.word
        inputs = {name: torch.as_tensor(np.asarray(value)) for name, value in made.items() if name not in OF_TEXT}
        return View(image=Image(inputs=inputs, token_id=self.token_id), slot=slot, tokens=self._count(slot))

    def show(self, example: Example) -> Example:
        """The example with its image, if it has one. Raises UserError if that is gone, or has come to take another
        number of tokens than when the record was tokenised."""
        if example.image_uri is None:
            return example
        try:
            view = self.look(example.image_uri)
        except ImageError as error:
            raise UserError(f"record {example.record_id!r}: cannot be looked at any more: {error}") from error
        found = example.prompt_ids.count(self.token_id)
        if found != view.tokens:
            raise UserError(
                f"record {example.record_id!r}: {example.image_uri}: takes {view.tokens} image tokens, its prompt has "
                f"{found}: the image or the processor is another than when the record was tokenised"
            )
        return dataclasses.replace(example, image=view.image)

    def render(self, messages: Sequence[Message], view: View | None = None, **options: Any) -> str:
        """The conversation as text, `view` ahead of its first user message.

        Raises UserError if the chat template has no place for an image, ImageError with the reason `image_word_in_text`
        if a message holds the word that stands for one.
        """
        text = self._render(messages, view is not None, self.folds_system, **options)
        if view is None:
            return text
        places = text.count(self.word)
        if places == 0:
            raise UserError(f"model_id: {self.place.model_id}: its chat template has no place for an image")
        if places > 1:
            raise ImageError("image_word_in_text", f"{places} places for one image: the text holds {self.word!r} too")
        return text.replace(self.word, view.slot)

    def encode(self, prompt: Sequence[Message], view: View | None) -> list[int]:
        """A prompt as tokens, BOS in front where the tokenizer has one; it raises as `render` does."""
        text = self.render(prompt, view, add_generation_prompt=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def check(self, model: Any, example: Example) -> None:
        """Raise UserError unless the model makes as many features of the example's image as its prompt has room for."""
        if example.image is None:
            return
        model = inner_model(model)
        weight = next(model.parameters())
        inputs = {name: tensor.to(weight.device) for name, tensor in example.image.inputs.items()}
        wanted = example.prompt_ids.count(self.token_id)
        if "aspect_ratio_ids" in inputs:
            return  # looked at by cross-attention, whatever the prompt's length
        with torch.no_grad():
            features = model.get_image_features(**inputs).pooler_output
        found = sum(part.reshape(-1, part.shape[-1]).shape[0] for part in features)
        if found != wanted:
            raise UserError(
                f"model_id: {self.place.model_id}: its processor makes room for {wanted} tokens of an image, of which "
                f"its model makes {found}"
            )

    @functools.lru_cache(maxsize=64)  # noqa: B019  a process has one processor, and images take few forms
    def _count(self, slot: str) -> int:
        ids: list[int] = self.tokenizer(slot, add_special_tokens=False)["input_ids"]
        return ids.count(self.token_id)

    def _folds_system(self) -> bool:
        """Whether the template refuses a system turn beside an image, as that of Llama 3.2 Vision does: what it says
        then goes ahead of the first user message."""
        turns = [Message(role="system", content="a"), Message(role="user", content="b")]
        try:
            self._render(turns, True, False)
        except jinja2.TemplateError:
            logger.info("%s: its chat template takes no system turn beside an image", self.place.model_id)
            return True
        return False

    def _render(self, messages: Sequence[Message], with_image: bool, folds_system: bool, **options: Any) -> str:
        turns: list[dict[str, Any]] = []
        ahead: list[dict[str, str]] = [{"type": "image"}] if with_image else []
        system = ""
        for message in messages:
            if message.role == "system" and folds_system and with_image:
                system += message.content + "\n\n"
                continue
            parts = [{"type": "text", "text": message.content}]
            if message.role == "user":
                parts = [*ahead, {"type": "text", "text": system + message.content}]
                ahead, system = [], ""
            turns.append({"role": message.role, "content": parts})
        try:
            return str(
                self.processor.apply_chat_template(turns, chat_template=self.template, tokenize=False, **options)
            )
        except TypeError as error:
            raise UserError(
                f"model_id: {self.place.model_id}: its chat template takes no parts of a message: {error}"
            ) from error
