"""A language model as teacher: how likely it finds each label's name as the answer to what is known of a record.

All names stand behind one run of the prompt. An engine that scores prompts one by one would run it for every name:
vLLM reads no cached prefix where it is asked for the prompt's log-probabilities (its V1 guide, "Prompt Logprobs with
Prefix Caching").
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
from mint_ray.images import Frame, ImageError, Pixels, Seen, read_images
from mint_ray.layouts import Example, Image, Layout
from mint_ray.layouts.choice import choose_layout
from mint_ray.layouts.likelihood import completion_scores
from mint_ray.models.architectures import model_class
from mint_ray.models.pretrained import Place, identity_of, sees_images
from mint_ray.models.vision_processor import FRAME, PROBE, Sight
from mint_ray.records import Label, Message, Record, TeacherScores
from mint_ray.teachers import FitReport
from mint_ray.teachers.config import PLACEHOLDER, Generative

PROBE_PROMPT = "Which of these is the most likely?"


class GenerativeTeacher:
    """Weights are read when the first record is asked about, so that whoever fits the teacher need not hold them."""

    def __init__(self, config: Generative) -> None:
        self.config = config
        self.labels: list[Label] = []

    def inputs(self) -> dict[str, str]:
        """The commit of a model of the Hub, or a sha256 over the files of a folder."""
        return {"model": identity_of(self.config.model_id, self.config.revision)}

    def fit(self, labels: Sequence[Label], records: Sequence[Record]) -> FitReport:
        """Nothing is learned; the names are kept."""
        self.labels = list(labels)
        return FitReport(counts={"labels": len(labels)})

    def save(self, folder: Path) -> None:
        names = [[label.label_id, label.name] for label in self.labels]
        (folder / "labels.json").write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")

    def load(self, folder: Path) -> None:
        names = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
        self.labels = [Label(label_id=label_id, name=name) for label_id, name in names]

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        return [self._score(record) for record in records]

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "labels": self.labels}  # weights are read again where it arrives

    def _score(self, record: Record) -> TeacherScores:
        prompt = write_prompt(self.config.prompt, record)
        if prompt is None:
            return self._failed(record, "nothing_to_ask")
        return self._ask(record, self._encode(prompt))

    def _ask(self, record: Record, prompt_ids: list[int], image: Image | None = None) -> TeacherScores:
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and len(prompt_ids) + max(map(len, self._names)) > limit:
            return self._failed(record, "prompt_too_long")
        scores = completion_scores(
            self._model,
            self._layout,
            prompt_ids,
            self._names,
            normalise=self.config.normalise,
            record_id=record.record_id,
            image=image,
        )
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        return TeacherScores(
            record_id=record.record_id, split=record.split, teacher=self.config.kind,
            labels=[self.labels[i].label_id for i in order], scores=[scores[i] for i in order],
        )  # fmt: skip

    def _failed(self, record: Record, reason: str) -> TeacherScores:
        return TeacherScores(
            record_id=record.record_id, split=record.split, teacher=self.config.kind,
            labels=[], scores=[], status="failed", reason=reason,
        )  # fmt: skip

    def _encode(self, prompt: str) -> list[int]:
        """As the model's chat template has a user ask it, or as plain text where it has none."""
        if self._tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}]
            ids: list[int] = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
            return ids
        return list(self._tokenizer(prompt)["input_ids"])

    @functools.cached_property
    def _tokenizer(self) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(
            self.config.model_id, revision=self.config.revision, trust_remote_code=False
        )
        if tokenizer.eos_token_id is None:
            raise UserError(f"model_id: {self.config.model_id}: its tokenizer has no end token")
        return tokenizer

    @functools.cached_property
    def _names(self) -> list[list[int]]:
        """Tokens of each label's name and the end: without it a name would be as likely as all that begin with it."""
        return [
            [
                *self._tokenizer(self._space + label.name, add_special_tokens=False)["input_ids"],
                self._tokenizer.eos_token_id,
            ]
            for label in self.labels
        ]

    @functools.cached_property
    def _model(self) -> Any:
        model = self._auto_class().from_pretrained(
            self.config.model_id,
            revision=self.config.revision,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="sdpa",
            dtype=getattr(torch, self.config.dtype),
        )
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    @functools.cached_property
    def _layout(self) -> Layout:
        return choose_layout(self._model, [self._probe()])

    def _probe(self) -> Example:
        # what every worker has alike, not the record that happens to come first
        prompt_ids = self._encode(PROBE_PROMPT)
        return Example(record_id="probe", prompt_ids=prompt_ids, completions=self._names[:4], pairs=[])

    @property
    def _space(self) -> str:
        # a turn begins with the name; plain text goes on with it
        return "" if self._tokenizer.chat_template else " "

    def _auto_class(self) -> Any:
        return AutoModelForCausalLM


class GenerativeViewer(GenerativeTeacher):
    """One that is shown the record's image ahead of the prompt."""

    def inputs(self) -> dict[str, str]:
        """As of one that reads. Raises UserError for a model in a folder that takes no images."""
        found = super().inputs()
        if Path(self.config.model_id).is_dir() and not sees_images(self._place):
            raise UserError(f"model_id: {self.config.model_id} reads text alone, and shows_image is set")
        return found

    def frame(self) -> Frame:
        return FRAME

    def score(self, records: Sequence[Record]) -> list[TeacherScores]:
        return self.score_seen(records, read_images([record.image_uri for record in records], FRAME))

    def score_seen(self, records: Sequence[Record], images: Seen) -> list[TeacherScores]:
        return [self._score_seen(record, image) for record, image in zip(records, images, strict=True)]

    def _score_seen(self, record: Record, image: Pixels | ImageError | None) -> TeacherScores:
        if isinstance(image, ImageError):
            return self._failed(record, image.reason)
        if image is None:
            return self._score(record)
        try:
            view = self._sight.view(image, record.image_uri or record.record_id)
            asked = [Message(role="user", content=fill_prompt(self.config.prompt, record))]
            prompt_ids = self._sight.encode(asked, view)
        except ImageError as error:
            return self._failed(record, error.reason)
        return self._ask(record, prompt_ids, view.image)

    def _encode(self, prompt: str) -> list[int]:
        return self._sight.encode([Message(role="user", content=prompt)], None)

    @property
    def _place(self) -> Place:
        return Place(model_id=self.config.model_id, path=self.config.model_id, revision=self.config.revision)

    @functools.cached_property
    def _sight(self) -> Sight:
        return Sight(self._place)

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return self._sight.tokenizer

    @functools.cached_property
    def _layout(self) -> Layout:
        probe = self._probe()
        self._sight.check(self._model, probe)
        return choose_layout(self._model, [probe])

    def _probe(self) -> Example:
        view = self._sight.view(PROBE, "probe")
        prompt_ids = self._sight.encode([Message(role="user", content=PROBE_PROMPT)], view)
        return Example(
            record_id="probe", prompt_ids=prompt_ids, completions=self._names[:4], pairs=[], image=view.image
        )

    @property
    def _space(self) -> str:
        return ""

    def _auto_class(self) -> Any:
        return model_class(self._place)


def write_prompt(template: str, record: Record) -> str | None:
    """The template with its gaps filled from the record; None if the record has nothing for any of them."""
    names = _parts(record)
    return fill_prompt(template, record) if any(names.get(name) for name in PLACEHOLDER.findall(template)) else None


def fill_prompt(template: str, record: Record) -> str:
    """The template with its gaps filled from the record, with nothing where it has nothing."""
    names = _parts(record)
    return PLACEHOLDER.sub(lambda match: names.get(match[1], ""), template)


def _parts(record: Record) -> dict[str, str]:
    return {
        "text": record.text or "",
        "findings": ", ".join(item.label or item.id for item in record.phenotypes if not item.excluded),
        "absent": ", ".join(item.label or item.id for item in record.phenotypes if item.excluded),
        **{f"fields.{name}": value for name, value in record.fields.items()},
    }
