"""A language model as teacher: how likely it finds each label's name as the answer to what is known of a record."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mint_ray.bundled.pretrained import identity_of
from mint_ray.layouts import Example, Layout
from mint_ray.layouts.choice import choose_layout
from mint_ray.layouts.likelihood import completion_scores
from mint_ray.loading import UserError
from mint_ray.records import Label, Record, TeacherScores
from mint_ray.teachers import FitReport
from mint_ray.teachers.config import PLACEHOLDER, Generative


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
        prompt_ids = self._encode(prompt)
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
        space = "" if self._tokenizer.chat_template else " "
        return [
            [
                *self._tokenizer(space + label.name, add_special_tokens=False)["input_ids"],
                self._tokenizer.eos_token_id,
            ]
            for label in self.labels
        ]

    @functools.cached_property
    def _model(self) -> Any:
        model = AutoModelForCausalLM.from_pretrained(
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
        # tried on what every worker has alike, not on the record that happens to come first
        prompt_ids = self._encode("Which of these is the most likely?")
        probe = Example(record_id="probe", prompt_ids=prompt_ids, completions=self._names[:4], pairs=[])
        return choose_layout(self._model, [probe])


def write_prompt(template: str, record: Record) -> str | None:
    """The template with its gaps filled from the record; None if the record has nothing for any of them."""
    names = {
        "text": record.text or "",
        "findings": ", ".join(item.label or item.id for item in record.phenotypes if not item.excluded),
        "absent": ", ".join(item.label or item.id for item in record.phenotypes if item.excluded),
        **{f"fields.{name}": value for name, value in record.fields.items()},
    }
    if not any(names.get(name) for name in PLACEHOLDER.findall(template)):
        return None
    return PLACEHOLDER.sub(lambda match: names.get(match[1], ""), template)
