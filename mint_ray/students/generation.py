"""Generation of answers by a student: free, constrained to the allowed answers, or as a ranking of all labels."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig

from mint_ray.config.loader import UserError
from mint_ray.images import ImageError, Pixels
from mint_ray.layouts import Example, Layout
from mint_ray.layouts.choice import choose_layout
from mint_ray.layouts.images import collate_images, image_kwargs, token_type_kwargs
from mint_ray.layouts.likelihood import completion_scores
from mint_ray.layouts.prefix import longest_common_prefix
from mint_ray.models.vision_processor import PROBE_IMAGE, ProcessedImage
from mint_ray.records import Message
from mint_ray.students.config import Generation, Student
from mint_ray.students.constrained_decoding import AllowedAnswers, AnswerTokens, DecodingState
from mint_ray.students.greedy_decoding import decode_greedily, prefill
from mint_ray.students.loading import load_model, load_tokenizer, load_vision_processor

Images = Sequence[ProcessedImage] | None
"""The images of some prompts, one per prompt; None for a text student."""


class StudentGenerator:
    """A student that answers prompts, on the GPU if there is one. In float32, answers do not depend on the batch."""

    def __init__(
        self,
        student: Student,
        generation: Generation,
        adapter: Path | None = None,
        *,
        answers: AllowedAnswers | None = None,
        batch_size: int = 16,
    ) -> None:
        """Load the student.

        Args:
            student: Settings of the student.
            generation: Settings of the generation.
            adapter: Folder from `save_adapter`; None for the base model.
            answers: Allowed answers, which `generate_constrained` and `rank` need.
            batch_size: Number of prompts per forward pass.

        Raises:
            UserError: The tokenizer does not support constrained decoding, or processor and model do not match.
        """
        self.vision_processor = load_vision_processor(student)
        self.tokenizer = self.vision_processor.tokenizer if self.vision_processor else load_tokenizer(student)
        # the completions of a batch start in the same column
        self.tokenizer.padding_side = "left"
        self._answer_tokens = None if answers is None else self._tokenize_answers(answers, student.model_id)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(student, adapter=adapter).to(self.device)
        self.batch_size = batch_size
        self.max_new_tokens = generation.max_new_tokens
        self.length_normalization = generation.length_normalization
        own = self.model.generation_config.eos_token_id
        self.eos_ids = {self.tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or [])}
        # replaces the checkpoint's own, whose temperature or repetition penalty would change the method
        self.model.generation_config = GenerationConfig(
            max_new_tokens=generation.max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(self.eos_ids),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        if self.vision_processor:
            self.vision_processor.check_features(self.model, self._probe([[self.tokenizer.eos_token_id]]))

    def process_image(self, prompt: Sequence[Message], pixels: Pixels | ImageError | None, name: str) -> ProcessedImage:
        """Return the decoded image of a prompt as `generate`, `generate_constrained` and `rank` take it.

        Args:
            prompt: The prompt, which must not contain the image token.
            pixels: The image as decoded with `vision_processor.FRAME`, the error of decoding it, or None.
            name: Name of the image in errors, such as its URI.

        Raises:
            ImageError: There is no image, it could not be decoded, or the processor or the prompt does not support it.
        """
        if self.vision_processor is None:
            raise ValueError("a text student takes no images")
        if pixels is None:
            raise ImageError("no_image", "the record has no image")
        if isinstance(pixels, ImageError):
            raise pixels
        processed = self.vision_processor.process(pixels, name)
        self.vision_processor.render(prompt, processed)
        return processed

    def generate(self, prompts: Sequence[Sequence[Message]], images: Images = None) -> list[str]:
        """Return one completion per prompt by greedy decoding, up to EOS (excluded) or `max_new_tokens`.

        Raises:
            UserError: A prompt and its completion do not fit into the model's context.
        """
        return self._in_batches(self._encode_all(prompts, images, self.max_new_tokens), images, self._decode)

    def generate_constrained(self, prompts: Sequence[Sequence[Message]], images: Images = None) -> list[str]:
        """Return one of the allowed answers per prompt, by greedy decoding among the tokens that continue one.

        Raises:
            UserError: A prompt and the longest answer do not fit into the model's context.
        """
        answer_tokens = self.answer_tokens
        prompt_ids = [
            [*ids, *answer_tokens.common_prefix] for ids in self._encode_all(prompts, images, answer_tokens.max_tokens)
        ]
        return self._in_batches(prompt_ids, images, self._decode_constrained)

    def rank(self, prompts: Sequence[Sequence[Message]], images: Images = None) -> list[list[float]]:
        """Return for each prompt the score of each label of the allowed answers, in the order of the labels.

        The score is the log-probability of the label's name as the first of the answer: summed over its tokens after
        the common prefix of all names and the token that ends it, or their mean (`length_normalization`). All names
        are scored in one forward pass after the prompt (`layouts.likelihood`).
        """
        names = self.answer_tokens.first_label_tokens
        # the common prefix has the same probability for all labels
        shared = longest_common_prefix([name[:-1] for name in names])
        longest, completions = max(map(len, names)), [name[len(shared) :] for name in names]
        encoded = self._encode_all(prompts, images, longest)
        return [
            completion_scores(
                self.model,
                self._layout,
                [*ids, *shared],
                completions,
                length_normalization=self.length_normalization,
                image=image.inputs if image else None,
            )
            for ids, image in zip(encoded, _image_per_prompt(prompts, images), strict=True)
        ]

    @property
    def answer_tokens(self) -> AnswerTokens:
        """Tokens of the allowed answers. Raises ValueError if none were given."""
        if self._answer_tokens is None:
            raise ValueError("this student was created without allowed answers")
        return self._answer_tokens

    def _tokenize_answers(self, answers: AllowedAnswers, model_id: str) -> AnswerTokens:
        prompt = [Message(role="user", content="?")]
        rendered = self.vision_processor.render(prompt, add_generation_prompt=True) if self.vision_processor else None
        return AnswerTokens(self.tokenizer, answers, model_id, rendered)

    @functools.cached_property
    def _layout(self) -> Layout:
        # tested on a fixed example: every worker chooses the same layout
        return choose_layout(self.model, [self._probe(self.answer_tokens.first_label_tokens[:4])])

    def _probe(self, completions: list[list[int]]) -> Example:
        prompt = [Message(role="user", content="Which of these is the most likely?")]
        image = self.vision_processor.process(PROBE_IMAGE, "probe") if self.vision_processor else None
        return Example(
            record_id="probe",
            prompt_ids=self._encode(prompt, image, 0),
            completions=completions,
            pairs=[],
            image=image.inputs if image else None,
        )

    def _encode_all(self, prompts: Sequence[Sequence[Message]], images: Images, new_tokens: int) -> list[list[int]]:
        per_prompt = _image_per_prompt(prompts, images)
        return [self._encode(prompt, image, new_tokens) for prompt, image in zip(prompts, per_prompt, strict=True)]

    def _encode(self, prompt: Sequence[Message], image: ProcessedImage | None, new_tokens: int) -> list[int]:
        ids: list[int]
        if self.vision_processor:
            ids = self.vision_processor.encode(prompt, image)
        else:
            messages = [dataclasses.asdict(message) for message in prompt]
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and len(ids) + new_tokens > limit:
            raise UserError(
                f"max_new_tokens: a prompt of {len(ids)} tokens and {new_tokens} new tokens "
                f"exceed the model's context of {limit}"
            )
        return ids

    def _in_batches(
        self,
        prompt_ids: list[list[int]],
        images: Images,
        decode: Callable[[list[list[int]], Images], list[str]],
    ) -> list[str]:
        # sorted by length, so that there is little padding; longest first, so that too large a batch fails at once
        order = sorted(range(len(prompt_ids)), key=lambda index: -len(prompt_ids[index]))
        completions = [""] * len(prompt_ids)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            batch_images = [images[index] for index in batch] if images else None
            texts = decode([prompt_ids[index] for index in batch], batch_images)
            for index, text in zip(batch, texts, strict=True):
                completions[index] = text
        return completions

    def _pad(self, prompt_ids: list[list[int]], images: Sequence[ProcessedImage]) -> dict[str, Tensor]:
        """Return model inputs of prompts with images, padded on the left."""
        inputs = dict(self.tokenizer.pad({"input_ids": prompt_ids}, return_tensors="pt"))
        examples = [
            Example(record_id="", prompt_ids=ids, completions=[], pairs=[], image=image.inputs)
            for ids, image in zip(prompt_ids, images, strict=True)
        ]
        batch = collate_images(inputs["input_ids"], examples)
        inputs |= image_kwargs(batch) | token_type_kwargs(self.model, batch)
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    @torch.inference_mode()
    def _decode(self, prompt_ids: list[list[int]], images: Images) -> list[str]:
        if images:
            inputs = self._pad(prompt_ids, images)
            output_BT = self.model.generate(**inputs)  # B prompts, T prompt and new tokens
            new = [self._until_eos(new_T) for new_T in output_BT[:, inputs["input_ids"].shape[1] :].tolist()]
        else:
            new = decode_greedily(
                self.model,
                prompt_ids,
                pad_id=self.tokenizer.pad_token_id,
                eos_ids=self.eos_ids,
                max_new_tokens=self.max_new_tokens,
            )
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in new]

    @torch.inference_mode()
    def _decode_constrained(self, prompt_ids: list[list[int]], images: Images) -> list[str]:
        answer_tokens = self.answer_tokens
        pad_id = self.tokenizer.pad_token_id
        inputs = self._pad(prompt_ids, images) if images else prefill(self.model, prompt_ids, pad_id)
        states = [DecodingState(answer_tokens) for _ in inputs["input_ids"]]
        answer_start = inputs["input_ids"].shape[1] - len(answer_tokens.common_prefix)

        def allowed_tokens(row: int, ids_T: Tensor) -> list[int]:
            state = states[row]
            for token in ids_T[answer_start + len(state.token_ids) :].tolist():
                if state.labels is None:
                    state.append(token)
            return state.allowed_tokens() or [pad_id]

        output_BT = self.model.generate(
            **inputs, max_new_tokens=answer_tokens.max_tokens, prefix_allowed_tokens_fn=allowed_tokens
        )
        for row, ids_T in enumerate(output_BT):
            allowed_tokens(row, ids_T)
        return [state.text() for state in states]

    def _until_eos(self, ids: list[int]) -> list[int]:
        return next((ids[:end] for end, token in enumerate(ids) if token in self.eos_ids), ids)


def _image_per_prompt(prompts: Sequence[Sequence[Message]], images: Images) -> Sequence[ProcessedImage | None]:
    return [None] * len(prompts) if images is None else images
