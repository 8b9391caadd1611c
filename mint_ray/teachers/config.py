"""Settings of the teachers."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field

from mint_ray.loading import settings


@settings
class Table:
    """Scores that someone else made: one row per record and label."""

    kind: Literal["table"] = "table"
    uri: str
    """Parquet, CSV or JSONL with the columns `record_id`, `label_id`, `score` (larger is better)."""


@settings
class Ontology:
    """Ranks labels by the semantic similarity of a patient's coded phenotypes to the annotated disease profiles."""

    kind: Literal["ontology"] = "ontology"
    absent_weight: float = 0.1
    """Weight of findings that were looked for and are absent although the disease would show them."""
    unknown_frequency: float = 0.5
    """Share of patients assumed where an annotation gives no frequency."""

    def __post_init__(self) -> None:
        if self.absent_weight < 0:
            raise ValueError(f"absent_weight must not be negative, got {self.absent_weight}")
        if not 0 < self.unknown_frequency <= 1:
            raise ValueError(f"unknown_frequency must lie in 0 to 1, got {self.unknown_frequency}")


PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
"""What the prompt of a generative teacher has its gaps written as."""


@settings
class Generative:
    """A language model that is asked how likely each label's name is as the answer to a prompt. It sees no image."""

    kind: Literal["generative"] = "generative"
    model_id: str
    """Folder of a causal language model in safetensors with its tokenizer, or its id on the Hugging Face Hub."""
    revision: str | None = None
    """Commit of a model of the Hub, all 40 digits, so that what was asked stays known; none for a folder."""
    prompt: str = (
        "{text}\nFindings: {findings}.\nAbsent: {absent}.\n\nWhich disease is most likely? Answer with its name."
    )
    """What is asked. `{text}`, `{findings}` and `{absent}` (names of the coded findings) and `{fields.age}` (or any
    other coded field) stand for what the record has, or for nothing; what is not named here, the model does not see."""
    normalise: Literal["mean", "sum"] = "mean"
    """The score is the log-probability of the name and the end behind it: its mean by token, or its sum, which
    favours short names."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in."""

    def __post_init__(self) -> None:
        _check_template("prompt", self.prompt)
        _check_revision(self.revision)


def _check_template(name: str, template: str) -> None:
    for gap in PLACEHOLDER.findall(template):
        if gap not in ("text", "findings", "absent") and not re.fullmatch(r"fields\.\w+", gap):
            raise ValueError(f"{name}: {{{gap}}} is no part of a record; known: text, findings, absent, fields.*")
    if not PLACEHOLDER.search(template):
        raise ValueError(
            f"{name}: holds nothing of the record; known: {{text}}, {{findings}}, {{absent}}, {{fields.*}}"
        )


def _check_revision(revision: str | None) -> None:
    if revision is not None and not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(f"revision must be a commit of 40 hexadecimal digits, got {revision!r}")


@settings
class Clip:
    """A model of the CLIP family (CLIP, SigLIP, PLIP), which has one space for images and texts."""

    kind: Literal["clip"] = "clip"
    model_id: str
    """Folder of the model in safetensors with its tokenizer and `preprocessor_config.json`, or its id on the Hugging
    Face Hub, such as `vinid/plip`."""
    revision: str | None = None
    """Commit of a model of the Hub, all 40 digits, so that what was asked stays known; none for a folder."""
    mode: Literal["zero_shot", "linear_probe"] = "zero_shot"
    """`zero_shot`: how like an image is to the names of the labels; `linear_probe`: a logistic regression on what the
    model makes of the training images, in which every label weighs the same."""
    templates: tuple[str, ...] = ("a photo of {}.",)
    """What is said of an image that shows a label, `{}` its name; a label is the mean of its name and synonyms in all
    of them. Of zero_shot."""
    c: float | None = None
    """How little the weights of a linear probe are held back, C of LIBLINEAR; null: chosen on the validation split."""
    text_template: str | None = None
    """What is read of a record beside its image, as the prompt of `generative`, cut off where the model's text ends;
    null: nothing."""
    text_weight: float = 0.5
    """Weight of what the text says, between 0 and 1, where there is an image too; a record that has one of the two is
    judged by that."""
    calibrate: bool = True
    """Fit a temperature to the labels of the validation split, where there are any."""
    max_bytes: int = 32_000_000
    """Largest image file."""
    max_pixels: int = 64_000_000
    """Largest height times width of an image."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in."""

    def __post_init__(self) -> None:
        if not self.templates:
            raise ValueError("templates must be one or more, got none")
        for template in self.templates:
            if template.count("{}") != 1:
                raise ValueError(f"templates: expected one {{}} for the label's name, got {template!r}")
        if self.text_template is not None:
            _check_template("text_template", self.text_template)
        if not 0 < self.text_weight < 1:
            raise ValueError(f"text_weight must lie between 0 and 1, got {self.text_weight}")
        if self.c is not None and not 0 < self.c < math.inf:
            raise ValueError(f"c must be positive and finite, got {self.c}")
        for name in ("max_bytes", "max_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        _check_revision(self.revision)


@settings
class Imported:
    """A teacher from a module of yours. Its code runs in every process that fits or asks it."""

    kind: Literal["import"] = "import"
    path: str
    """`package.module:Class`; the module must be installed or on PYTHONPATH, on every machine of the cluster. The class
    has the methods of `mint_ray.teachers.Teacher`."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword arguments of the class; what is secret belongs in the environment, for every manifest repeats them."""

    def __post_init__(self) -> None:
        module, colon, name = self.path.partition(":")
        if not colon or not all(part.isidentifier() for part in [*module.split("."), *name.split(".")]):
            raise ValueError(f"path must be package.module:Class, got {self.path!r}")


@settings
class Member:
    """One teacher of an ensemble."""

    teacher: AnyTeacher
    """Its own settings."""
    weight: float | None = None
    """Its weight beside the others'; null: 1, and with learned weights there is nothing else."""
    temperature: float = 1.0
    """Its scores are divided by this ahead of the softmax: below 1 sharpens, above 1 flattens."""
    labels: tuple[str, ...] = ()
    """Ids of the task's labels that it is asked for; empty: all."""

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise ValueError(f"weight must be positive and finite, got {self.weight}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")


@settings
class Ensemble:
    """Several teachers as one: the weighted mean of their softmax-normalised scores."""

    kind: Literal["ensemble"] = "ensemble"
    members: tuple[Member, ...]
    """At least two."""
    weights: Literal["given", "learned"] = "given"
    """`learned`: those under which the true labels of the validation split are most likely."""

    def __post_init__(self) -> None:
        if len(self.members) < 2:
            raise ValueError(f"members must be two or more, got {len(self.members)}")
        if self.weights == "learned" and any(member.weight is not None for member in self.members):
            raise ValueError("weights are to be learned, yet a member is given one")


AnyTeacher = Annotated[Table | Ontology | Generative | Clip | Imported | Ensemble, Field(discriminator="kind")]
