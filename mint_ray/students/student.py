"""Load a student and its tokenizer, lay an adapter over it, let it answer, and save what it learnt."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from mint_ray.config.loader import UserError
from mint_ray.images import ImageError
from mint_ray.layouts import Example, Layout
from mint_ray.layouts.choice import choose_layout
from mint_ray.layouts.images import image_inputs, inner_model, lay_images, token_kinds
from mint_ray.layouts.likelihood import completion_scores
from mint_ray.models.architectures import model_class
from mint_ray.models.pretrained import sees_images
from mint_ray.models.vision_processor import PROBE, Sight, View
from mint_ray.records import Message
from mint_ray.students.adapters import lay_adapter, rest, train_parts
from mint_ray.students.config import Generation, Student
from mint_ray.students.constrained_decoding import Answers, Vocabulary, Walk, shared_prefix
from mint_ray.students.generation import begin_answers, decode_greedily
from mint_ray.students.weights import resolve_path, student_place


def load_tokenizer(config: Student) -> Any:
    """The student's tokenizer, with a pad token. Raises UserError if it has no chat template or no end token."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_path(config), revision=config.revision, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise UserError(f"model_id: {config.model_id}: its tokenizer has no chat template; take an instruct model")
    if tokenizer.eos_token is None:
        raise UserError(f"model_id: {config.model_id}: its tokenizer has no end token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_sight(config: Student) -> Sight | None:
    """What a student that sees reads with; None for one that reads text alone."""
    place = student_place(config)
    return Sight(place) if sees_images(place) else None


def load_processor(config: Student) -> Any:
    """What has to lie beside the student's weights: its tokenizer, or the processor around it."""
    sight = load_sight(config)
    return sight.processor if sight else load_tokenizer(config)


def load_model(config: Student, *, adapter: Path | None = None, trainable: bool = False) -> Any:
    """The student on the CPU: ready to answer (adapter merged, eval mode) or, if `trainable`, to learn.

    `adapter` is a folder from `save_adapter`. A trainable student with `lora_rank` is wrapped by PEFT, so that only the
    LoRA weights get gradients; they are drawn from torch's global generator, which the caller seeds. Of a student that
    sees, the parts that do not learn rest (`parts.rest`).
    Raises UserError if `adapter` does not hold what `lora_rank` asks for.
    """
    place = student_place(config)
    source, revision = place.path, config.revision
    if adapter is not None:
        wanted = "config.json" if config.lora_rank is None else "adapter_config.json"
        if not (adapter / wanted).is_file():
            raise UserError(f"{adapter}: no {wanted}, yet lora_rank is {config.lora_rank}")
        if config.lora_rank is None:
            source, revision = str(adapter), None
    sees = sees_images(place)
    model = model_class(place).from_pretrained(
        source,
        revision=revision,
        trust_remote_code=False,
        use_safetensors=True,
        attn_implementation="sdpa",
        dtype=getattr(torch, config.dtype),
    )
    if config.lora_rank is not None and adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
        if not trainable:
            model = model.merge_and_unload()
    elif config.lora_rank is not None and trainable:
        model = lay_adapter(model, config, sees=sees)
        model.peft_config["default"].base_model_name_or_path = config.model_id
    elif sees and trainable:
        train_parts(model, config)
    if not trainable:
        return model.eval()
    model.train()
    if sees:
        rest(inner_model(model))
    return model


def save_adapter(model: Any, processor: Any, path: Path) -> None:
    """Write what was trained (LoRA weights, or every weight) as safetensors into `path`, and what it reads with."""
    if isinstance(model, PeftModel):
        # no vocabulary is ever resized here, and finding that out would ask the hub
        model.save_pretrained(path, save_embedding_layers=False)
    else:
        model.save_pretrained(path)
    processor.save_pretrained(path)


class StudentGenerator:
    """A student that answers prompts, on the GPU where there is one; the same answer in any batch in float32."""

    def __init__(
        self,
        config: Student,
        generation: Generation,
        adapter: Path | None = None,
        *,
        answers: Answers | None = None,
        batch_size: int = 16,
    ) -> None:
        """`adapter` is a folder from `save_adapter`, None for the base model; `batch_size` is prompts per pass.

        `answers` are those that `choose` and `rank` go by. Raises UserError if a tokenizer cannot serve them, or the
        processor of a student that sees does not fit its model.
        """
        self.sight = load_sight(config)
        self.tokenizer = self.sight.tokenizer if self.sight else load_tokenizer(config)
        # the answers of a batch start in the same column
        self.tokenizer.padding_side = "left"
        turns = [Message(role="user", content="?")]
        turn = self.sight.render(turns, add_generation_prompt=True) if self.sight else None
        self.vocabulary = None if answers is None else Vocabulary(self.tokenizer, answers, config.model_id, turn)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(config, adapter=adapter).to(self.device)
        self.batch_size = batch_size
        self.max_new_tokens = generation.max_new_tokens
        self.normalise = generation.normalise
        own = self.model.generation_config.eos_token_id
        self.eos_ids = {self.tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or [])}
        # in place of the checkpoint's own: its temperature or repetition penalty would make another method
        self.model.generation_config = GenerationConfig(
            max_new_tokens=generation.max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(self.eos_ids),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        if self.sight:
            self.sight.check(self.model, self._probe([[self.tokenizer.eos_token_id]]))

    def look(self, prompt: Sequence[Message], image_uri: str | None) -> View:
        """The image that goes with a prompt, for a student that sees; the three methods below then take one a prompt.

        Raises ImageError with the reason if it cannot be looked at, or the prompt has other than one place for it.
        """
        if self.sight is None:
            raise ValueError("this student reads text alone")
        if image_uri is None:
            raise ImageError("no_image", "the record has no image")
        view = self.sight.look(image_uri)
        self.sight.render(prompt, view)
        return view

    def generate(self, prompts: Sequence[Sequence[Message]], views: Sequence[View] | None = None) -> list[str]:
        """One completion per prompt, in order, up to the end token (left out) or `max_new_tokens`.

        Raises UserError if a prompt and its answer do not fit into the model's context.
        """
        return self._batched(self._encode_all(prompts, views, self.max_new_tokens), views, self._complete)

    def choose(self, prompts: Sequence[Sequence[Message]], views: Sequence[View] | None = None) -> list[str]:
        """One of the `answers` per prompt, in order: token by token the likeliest that one of them goes on with.

        Raises UserError if a prompt and the longest answer do not fit into the model's context.
        """
        vocabulary = self._vocabulary
        prompt_ids = [[*ids, *vocabulary.opening] for ids in self._encode_all(prompts, views, vocabulary.longest)]
        return self._batched(prompt_ids, views, self._complete_as_allowed)

    def rank(self, prompts: Sequence[Sequence[Message]], views: Sequence[View] | None = None) -> list[list[float]]:
        """For each prompt, how likely each label of the `answers` is as the first name, in the order of the labels.

        A log-probability: the sum over the tokens in which the names differ and the one behind, or its mean by token.
        All names stand behind the prompt in one pass (`layouts.likelihood`).
        """
        names = self._vocabulary.first_names
        # what all names begin with tells nothing
        opening = shared_prefix([name[:-1] for name in names])
        longest, completions = max(map(len, names)), [name[len(opening) :] for name in names]
        return [
            completion_scores(
                self.model,
                self._layout,
                [*ids, *opening],
                completions,
                normalise=self.normalise,
                image=view.image if view else None,
            )
            for ids, view in zip(self._encode_all(prompts, views, longest), _looks(prompts, views), strict=True)
        ]

    @property
    def _vocabulary(self) -> Vocabulary:
        if self.vocabulary is None:
            raise ValueError("this student was not told the answers that it may give")
        return self.vocabulary

    @functools.cached_property
    def _layout(self) -> Layout:
        # tried on what every worker has alike, not on the record that happens to come first
        return choose_layout(self.model, [self._probe(self._vocabulary.first_names[:4])])

    def _probe(self, completions: list[list[int]]) -> Example:
        prompt = [Message(role="user", content="Which of these is the most likely?")]
        view = self.sight.view(PROBE, "probe") if self.sight else None
        return Example(
            record_id="probe",
            prompt_ids=self._encode(prompt, view, 0),
            completions=completions,
            pairs=[],
            image=view.image if view else None,
        )

    def _encode_all(
        self, prompts: Sequence[Sequence[Message]], views: Sequence[View] | None, new_tokens: int
    ) -> list[list[int]]:
        looks = _looks(prompts, views)
        return [self._encode(prompt, view, new_tokens) for prompt, view in zip(prompts, looks, strict=True)]

    def _encode(self, prompt: Sequence[Message], view: View | None, new_tokens: int) -> list[int]:
        ids: list[int]
        if self.sight:
            ids = self.sight.encode(prompt, view)
        else:
            messages = [dataclasses.asdict(message) for message in prompt]
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and len(ids) + new_tokens > limit:
            raise UserError(
                f"max_new_tokens: a prompt of {len(ids)} tokens and {new_tokens} new ones "
                f"exceed the model's context of {limit}"
            )
        return ids

    def _batched(
        self,
        prompt_ids: list[list[int]],
        views: Sequence[View] | None,
        complete: Callable[[list[list[int]], Sequence[View] | None], list[str]],
    ) -> list[str]:
        # neighbours of like length waste little on padding; longest first, so that too large a batch fails at once
        order = sorted(range(len(prompt_ids)), key=lambda index: -len(prompt_ids[index]))
        completions = [""] * len(prompt_ids)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            looks = [views[index] for index in batch] if views else None
            for index, text in zip(batch, complete([prompt_ids[index] for index in batch], looks), strict=True):
                completions[index] = text
        return completions

    def _pad(self, prompt_ids: list[list[int]], views: Sequence[View]) -> dict[str, Tensor]:
        """Prompts with images, padded on their left."""
        inputs = dict(self.tokenizer.pad({"input_ids": prompt_ids}, return_tensors="pt"))
        examples = [
            Example(record_id="", prompt_ids=ids, completions=[], pairs=[], image=view.image)
            for ids, view in zip(prompt_ids, views, strict=True)
        ]
        batch = lay_images(inputs["input_ids"], examples)
        inputs |= image_inputs(batch) | token_kinds(self.model, batch)
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    @torch.inference_mode()
    def _complete(self, prompt_ids: list[list[int]], views: Sequence[View] | None) -> list[str]:
        if views:
            inputs = self._pad(prompt_ids, views)
            output_BT = self.model.generate(**inputs)  # B prompts, T prompt and new tokens
            new = [self._until_end(new_T) for new_T in output_BT[:, inputs["input_ids"].shape[1] :].tolist()]
        else:
            new = decode_greedily(
                self.model,
                prompt_ids,
                pad_id=self.tokenizer.pad_token_id,
                end_ids=self.eos_ids,
                max_new_tokens=self.max_new_tokens,
            )
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in new]

    @torch.inference_mode()
    def _complete_as_allowed(self, prompt_ids: list[list[int]], views: Sequence[View] | None) -> list[str]:
        vocabulary = self._vocabulary
        pad_id = self.tokenizer.pad_token_id
        inputs = self._pad(prompt_ids, views) if views else begin_answers(self.model, prompt_ids, pad_id)
        walks = [Walk(vocabulary) for _ in inputs["input_ids"]]
        opened = inputs["input_ids"].shape[1] - len(vocabulary.opening)

        def allowed(row: int, ids_T: Tensor) -> list[int]:
            walk = walks[row]
            for token in ids_T[opened + len(walk.ids) :].tolist():
                if walk.named is None:
                    walk.step(token)
            return walk.allowed() or [pad_id]

        output_BT = self.model.generate(**inputs, max_new_tokens=vocabulary.longest, prefix_allowed_tokens_fn=allowed)
        for row, ids_T in enumerate(output_BT):
            allowed(row, ids_T)
        return [walk.text() for walk in walks]

    def _until_end(self, ids: list[int]) -> list[int]:
        return next((ids[:end] for end, token in enumerate(ids) if token in self.eos_ids), ids)


def _looks(prompts: Sequence[Sequence[Message]], views: Sequence[View] | None) -> Sequence[View | None]:
    return [None] * len(prompts) if views is None else views
