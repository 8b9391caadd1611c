"""A language model as teacher: scores are likelihoods of the labels' names as the answer to a prompt about a record.

The prompt runs once for all names. An engine that scores prompts one by one would run it for every name: vLLM does not
use its prefix cache for requests of prompt log-probabilities (its V1 guide, "Prompt Logprobs with Prefix Caching").
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mint_ray.config.loader import UserError
from mint_ray.images import Frame, ImageError, Images, Pixels, read_images
from mint_ray.layouts import Example, ImageInputs, Layout
from mint_ray.layouts.choice import choose_layout
from mint_ray.layouts.likelihood import completion_scores
from mint_ray.models.architectures import auto_class
from mint_ray.models.pretrained import PretrainedModel, resolve_model
from mint_ray.models.vision_processor import FRAME, PROBE_IMAGE, VisionProcessor
from mint_ray.records import Label, Message, Record, TeacherScores
from mint_ray.teachers import FitReport
from mint_ray.teachers.config import Generative
from mint_ray.teachers.rankings import failed_ranking, rank_labels
from mint_ray.teachers.templates import render_nonempty, render_template

PROBE_PROMPT = "Which of these is the most likely?"
"""Fixed prompt with which every worker chooses its layout."""


def build_generative(config: Generative) -> GenerativeTeacher:
    """Return the teacher; an `ImageTeacher` if it is shown images."""
    return GenerativeImageTeacher(config) if config.show_image else GenerativeTeacher(config)


class GenerativeTeacher:
    """Teacher that reads text. Weights are loaded for the first record, so that the driver needs no memory for them."""

    def __init__(self, config: Generative) -> None:
        self.config = config
        self.labels: list[Label] = []

    def fit(self, labels: Sequence[Label], records: Sequence[Record]) -> FitReport:
        """Store the labels; nothing is learned."""
        self.labels = list(labels)
        return FitReport(counts={"labels": len(labels)})

    def save(self, folder: Path) -> None:
        """Write ids and names of the labels to `labels.json`."""
        names = [[label.label_id, label.name] for label in self.labels]
        (folder / "labels.json").write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        names = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
        self.labels = [Label(label_id=label_id, name=name) for label_id, name in names]

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        """Return one ranking per record, in order; a record fails with `empty_prompt` or `prompt_too_long`."""
        return [self._score(record) for record in records]

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "labels": self.labels}  # the receiving process loads the weights itself

    def _score(self, record: Record) -> TeacherScores:
        prompt = render_nonempty(self.config.prompt, record)
        if prompt is None:
            return failed_ranking(record, self.config.kind, "empty_prompt")
        return self._rank(record, self._encode(prompt))

    def _rank(self, record: Record, prompt_ids: list[int], image: ImageInputs | None = None) -> TeacherScores:
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and len(prompt_ids) + max(map(len, self._names)) > limit:
            return failed_ranking(record, self.config.kind, "prompt_too_long")
        scores = completion_scores(
            self._model,
            self._layout,
            prompt_ids,
            self._names,
            length_normalization=self.config.length_normalization,
            record_id=record.record_id,
            image=image,
        )
        return rank_labels(record, self.config.kind, [label.label_id for label in self.labels], scores)

    def _encode(self, prompt: str) -> list[int]:
        """Return the prompt as a user message of the chat template, or as plain text if there is none."""
        if self._tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}]
            ids: list[int] = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            return ids
        return list(self._tokenizer(prompt)["input_ids"])

    @functools.cached_property
    def _pretrained(self) -> PretrainedModel:
        return resolve_model(self.config, "other")

    @functools.cached_property
    def _tokenizer(self) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(
            self._pretrained.path, revision=self._pretrained.revision, trust_remote_code=False
        )
        if tokenizer.eos_token_id is None:
            raise UserError(f"model_id: {self.config.model_id}: its tokenizer has no EOS token")
        return tokenizer

    @functools.cached_property
    def _names(self) -> list[list[int]]:
        """Tokens of each label's name and EOS; without EOS its score would include all names that begin with it."""
        return [
            [
                *self._tokenizer(self._separator + label.name, add_special_tokens=False)["input_ids"],
                self._tokenizer.eos_token_id,
            ]
            for label in self.labels
        ]

    @functools.cached_property
    def _model(self) -> Any:
        model = self._auto_class.from_pretrained(
            self._pretrained.path,
            revision=self._pretrained.revision,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="sdpa",
            dtype=getattr(torch, self.config.dtype),
        )
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    @functools.cached_property
    def _layout(self) -> Layout:
        return choose_layout(self._model, [self._build_probe()])

    def _build_probe(self) -> Example:
        # the same on every worker, not the record that happens to come first
        prompt_ids = self._encode(PROBE_PROMPT)
        return Example(record_id="probe", prompt_ids=prompt_ids, completions=self._names[:4], pairs=[])

    @property
    def _separator(self) -> str:
        # an assistant message begins with the name; plain text continues with it
        return "" if self._tokenizer.chat_template else " "

    @property
    def _auto_class(self) -> Any:
        return AutoModelForCausalLM


class GenerativeImageTeacher(GenerativeTeacher):
    """Teacher that is shown the record's image ahead of the prompt."""

    def frame(self) -> Frame:
        """Return the form in which images are decoded."""
        return FRAME

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        """Return one ranking per record, in order; a record also fails if its image cannot be read."""
        return self.score_images(records, read_images([record.image_uri for record in records], FRAME))

    def score_images(self, records: Sequence[Record], images: Images) -> list[TeacherScores]:
        """Return one ranking per record, in order, from decoded images."""
        return [self._score_image(record, image) for record, image in zip(records, images, strict=True)]

    def _score_image(self, record: Record, image: Pixels | ImageError | None) -> TeacherScores:
        if image is None:
            return self._score(record)
        try:
            if isinstance(image, ImageError):
                raise image
            processed = self._processor.process(image, record.image_uri or record.record_id)
            messages = [Message(role="user", content=render_template(self.config.prompt, record))]
            prompt_ids = self._processor.encode(messages, processed)
        except ImageError as error:
            return failed_ranking(record, self.config.kind, error.reason)
        return self._rank(record, prompt_ids, processed.inputs)

    def _encode(self, prompt: str) -> list[int]:
        return self._processor.encode([Message(role="user", content=prompt)], None)

    @functools.cached_property
    def _processor(self) -> VisionProcessor:
        return VisionProcessor(self._pretrained)

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return self._processor.tokenizer

    @functools.cached_property
    def _layout(self) -> Layout:
        probe = self._build_probe()
        self._processor.check_features(self._model, probe)
        return choose_layout(self._model, [probe])

    def _build_probe(self) -> Example:
        processed = self._processor.process(PROBE_IMAGE, "probe")
        prompt_ids = self._processor.encode([Message(role="user", content=PROBE_PROMPT)], processed)
        return Example(
            record_id="probe", prompt_ids=prompt_ids, completions=self._names[:4], pairs=[], image=processed.inputs
        )

    @property
    def _separator(self) -> str:
        return ""

    @property
    def _auto_class(self) -> Any:
        return auto_class(self._pretrained)
