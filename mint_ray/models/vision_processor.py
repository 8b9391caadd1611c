"""The processor of a vision-language model: image tensors, and prompts with placeholders for images."""

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

from mint_ray.config.loader import UserError, one_line
from mint_ray.images import Frame, ImageError, Pixels, read_image
from mint_ray.layouts import Example, ImageInputs
from mint_ray.layouts.images import unwrap_model
from mint_ray.models.architectures import load_config
from mint_ray.models.pretrained import PretrainedModel
from mint_ray.models.vision_towers import register_vision_towers
from mint_ray.records import Message

logger = logging.getLogger(__name__)

FRAME = Frame(size=2048, fit="within")
"""The form in which images are decoded: no model uses a higher resolution, and the processor scales further down."""

PROBE_IMAGE = np.linspace(0, 255, 64 * 64 * 3).astype(np.uint8).reshape(64, 64, 3)
"""A fixed image with which every worker tests its model."""

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask")
"""Outputs of a processor that describe the text, which is tokenized elsewhere."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProcessedImage:
    """One image, ready for the model and for the prompt."""

    inputs: ImageInputs
    placeholder: str
    """Text that stands in the prompt for this image, with as many image tokens as the model makes of it."""
    num_tokens: int
    """Number of image tokens in the placeholder."""


class VisionProcessor:
    """The processor of a vision-language model."""

    def __init__(self, model: PretrainedModel) -> None:
        """Load the processor.

        Raises:
            UserError: There is no processor or chat template, or its image token is not that of the model.
        """
        self.model = model
        self.processor: Any = _load_processor(model)
        self.tokenizer: Any = self.processor.tokenizer
        if self.tokenizer.eos_token is None:
            raise UserError(f"model_id: {model.model_id}: its tokenizer has no EOS token")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.chat_template = self.processor.chat_template or self.tokenizer.chat_template
        if not self.chat_template:
            raise UserError(f"model_id: {model.model_id}: its processor has no chat template; use an instruct model")
        self.image_token: str = self.processor.image_token
        self.image_token_id: int = self.processor.image_token_ids[0]
        expected = load_config(model).image_token_id
        if self.image_token_id != expected:
            raise UserError(
                f"model_id: {model.model_id}: image token of the processor is {self.image_token_id}, "
                f"of the model {expected}"
            )
        self.merges_system_message = not self._accepts_system_message()

    def process(self, pixels: Pixels, name: str) -> ProcessedImage:
        """Return a decoded image (`FRAME`) as the model takes it; `name` identifies it in errors.

        Raises:
            ImageError: The processor rejects the image; the reason is `image_refused`.
        """
        images = [PillowImage.fromarray(pixels)]
        try:
            outputs = self.processor(images=images, text=[self.image_token], return_text_replacement_offsets=True)
        except ValueError as error:
            # for example Qwen's, for an image two hundred times as long as it is wide
            raise ImageError("image_refused", f"{name}: {one_line(error)}") from error
        offsets = outputs.pop("text_replacement_offsets", None)
        placeholder = offsets[0][0]["replacement"] if offsets else self.image_token
        tensors = {
            name: torch.as_tensor(np.asarray(value)) for name, value in outputs.items() if name not in TEXT_INPUTS
        }
        return ProcessedImage(
            inputs=ImageInputs(tensors=tensors, token_id=self.image_token_id),
            placeholder=placeholder,
            num_tokens=self._count_image_tokens(placeholder),
        )

    def read(self, uri: str) -> ProcessedImage:
        """Read, decode and process the image at `uri`. Raises ImageError as `images.read_image` and `process` do."""
        return self.process(read_image(uri, FRAME), uri)

    def add_image(self, example: Example, pixels: Pixels | ImageError | None = None) -> Example:
        """Return the example with the image at its `image_uri`; the same example if it has none.

        Args:
            example: A tokenized record, whose prompt has a placeholder for the image.
            pixels: The decoded image, or the error of decoding it; None to read it here.

        Raises:
            UserError: The image cannot be read any more, or needs another number of tokens than the prompt has.
        """
        if example.image_uri is None:
            return example
        try:
            if isinstance(pixels, ImageError):
                raise pixels
            uri = example.image_uri
            processed = self.read(uri) if pixels is None else self.process(pixels, uri)
        except ImageError as error:
            raise UserError(f"record {example.record_id!r}: the image cannot be read any more: {error}") from error
        found = example.prompt_ids.count(self.image_token_id)
        if found != processed.num_tokens:
            raise UserError(
                f"record {example.record_id!r}: {example.image_uri} needs {processed.num_tokens} image tokens, its "
                f"prompt has {found}: the image or the processor has changed since the record was tokenized"
            )
        return dataclasses.replace(example, image=processed.inputs)

    def render(self, messages: Sequence[Message], image: ProcessedImage | None = None, **options: Any) -> str:
        """Return the conversation as text, with the image's placeholder in front of the first user message.

        Args:
            messages: The conversation.
            image: The image that belongs to it, if any.
            **options: Options of `apply_chat_template`.

        Raises:
            UserError: The chat template does not support images.
            ImageError: A message contains the image token; the reason is `image_token_in_text`.
        """
        text = self._apply_template(messages, image is not None, self.merges_system_message, **options)
        if image is None:
            return text
        count = text.count(self.image_token)
        if count == 0:
            raise UserError(f"model_id: {self.model.model_id}: its chat template does not support images")
        if count > 1:
            raise ImageError(
                "image_token_in_text", f"the text contains {self.image_token!r}, which stands for an image"
            )
        return text.replace(self.image_token, image.placeholder)

    def encode(self, prompt: Sequence[Message], image: ProcessedImage | None) -> list[int]:
        """Return a prompt as token ids, with BOS in front if the tokenizer has one. Raises as `render` does."""
        text = self.render(prompt, image, add_generation_prompt=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def check_features(self, model: Any, example: Example) -> None:
        """Check that the model makes as many features of the example's image as its prompt has image tokens.

        Raises:
            UserError: The numbers differ, so processor and model do not belong together.
        """
        if example.image is None:
            return
        model = unwrap_model(model)
        weight = next(model.parameters())
        inputs = {name: tensor.to(weight.device) for name, tensor in example.image.tensors.items()}
        expected = example.prompt_ids.count(self.image_token_id)
        if "aspect_ratio_ids" in inputs:
            return  # a model with cross-attention, for which the prompt's length does not matter
        with torch.no_grad():
            features = model.get_image_features(**inputs).pooler_output
        found = sum(part.reshape(-1, part.shape[-1]).shape[0] for part in features)
        if found != expected:
            raise UserError(
                f"model_id: {self.model.model_id}: its processor reserves {expected} tokens for an image, but its "
                f"model makes {found}"
            )

    @functools.lru_cache(maxsize=64)  # noqa: B019 -- a process has one processor, and there are few placeholders
    def _count_image_tokens(self, placeholder: str) -> int:
        ids: list[int] = self.tokenizer(placeholder, add_special_tokens=False)["input_ids"]
        return ids.count(self.image_token_id)

    def _accepts_system_message(self) -> bool:
        """Return False if the template rejects a system message together with an image, as Llama 3.2 Vision's does.

        The system message is then put in front of the first user message.
        """
        messages = [Message(role="system", content="a"), Message(role="user", content="b")]
        try:
            self._apply_template(messages, True, False)
        except jinja2.TemplateError:
            logger.info("%s: its chat template takes no system message together with an image", self.model.model_id)
            return False
        return True

    def _apply_template(
        self, messages: Sequence[Message], with_image: bool, merges_system_message: bool, **options: Any
    ) -> str:
        conversation: list[dict[str, Any]] = []
        image_parts: list[dict[str, str]] = [{"type": "image"}] if with_image else []
        system = ""
        for message in messages:
            if message.role == "system" and merges_system_message and with_image:
                system += message.content + "\n\n"
                continue
            parts = [{"type": "text", "text": message.content}]
            if message.role == "user":
                parts = [*image_parts, {"type": "text", "text": system + message.content}]
                image_parts, system = [], ""
            conversation.append({"role": message.role, "content": parts})
        try:
            return str(
                self.processor.apply_chat_template(
                    conversation, chat_template=self.chat_template, tokenize=False, **options
                )
            )
        except TypeError as error:
            raise UserError(
                f"model_id: {self.model.model_id}: its chat template takes only text as message content: {error}"
            ) from error


def _load_processor(model: PretrainedModel) -> Any:
    """Return the transformers processor, with an image processor and a tokenizer."""
    register_vision_towers()
    try:
        processor = AutoProcessor.from_pretrained(model.path, revision=model.revision, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        hint = "pip install 'mint-ray[vision]': " if isinstance(error, ImportError) else ""
        raise UserError(f"model_id: {model.model_id}: no processor: {hint}{one_line(error)}") from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise UserError(f"model_id: {model.model_id}: {type(processor).__name__} is no processor of images and text")
    return processor
