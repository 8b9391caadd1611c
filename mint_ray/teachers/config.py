"""Settings of the teachers."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field

from mint_ray.config.loader import settings


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
    """A language model that is asked how likely each label's name is as the answer to a prompt."""

    kind: Literal["generative"] = "generative"
    model_id: str
    """Folder of a causal language model in safetensors with its tokenizer, or its id on the Hugging Face Hub."""
    revision: str | None = None
    """Commit of a model of the Hub, all 40 digits, so that what was asked stays known; none for a folder."""
    shows_image: bool = False
    """Whether the record's image stands ahead of the prompt, for a model that takes both (LLaVA, Qwen-VL, Llama 3.2
    Vision and others) with its processor. A record without an image is asked about by the prompt alone."""
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
        _check_template("prompt", self.prompt, may_be_plain=self.shows_image)
        _check_revision(self.revision)


def _check_template(name: str, template: str, *, may_be_plain: bool = False) -> None:
    for gap in PLACEHOLDER.findall(template):
        if gap not in ("text", "findings", "absent") and not re.fullmatch(r"fields\.\w+", gap):
            raise ValueError(f"{name}: {{{gap}}} is no part of a record; known: text, findings, absent, fields.*")
    if not (may_be_plain or PLACEHOLDER.search(template)):
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
class TwoTowers:
    """A model of the CLIP family that tells how like an image and a text are, and teaches nobody."""

    model_id: str
    """Folder of the model, or its id on the Hugging Face Hub, as that of a `clip` teacher."""
    revision: str | None = None
    """Commit of a model of the Hub, all 40 digits; none for a folder."""
    max_bytes: int = 32_000_000
    """Largest image file."""
    max_pixels: int = 64_000_000
    """Largest height times width of an image."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in."""

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        _check_revision(self.revision)


@settings
class LanguageBlock:
    """One frozen transformer block of a language model between an image encoder's tokens and what is made of them
    (arXiv 2403.17343), with a linear layer that is trained ahead of it and one behind it."""

    model_id: str
    """Folder of a Llama-like causal language model in safetensors, or its id on the Hugging Face Hub."""
    revision: str | None = None
    """Commit of a model of the Hub."""
    layer: int = -1
    """Which block, from 0; negative numbers count from the last."""

    def __post_init__(self) -> None:
        _check_revision(self.revision)


@settings
class Augmentation:
    """How the images are varied in training; what changes what an image means must be turned off."""

    flip: bool = True
    """Mirror half of them."""
    turn: bool = True
    """Turn them by 0, 90, 180 or 270 degrees."""
    crop: float = 0.8
    """Least share of the side that is seen; 1 shows all of it."""
    colour: float = 0.1
    """Largest relative change of brightness, contrast and saturation; 0 for none."""

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop must lie above 0 and at most at 1, got {self.crop}")
        if not 0 <= self.colour < 1:
            raise ValueError(f"colour must be at least 0 and below 1, got {self.colour}")


def _check_train(train: str) -> None:
    if not re.fullmatch(r"frozen|all|last:[1-9]\d*", train):
        raise ValueError(f"train must be frozen, all or last:N, got {train!r}")


@settings
class FusionImage:
    """The image of a record, through a vision encoder."""

    model_id: str = "bundled:efficientnet-lite0"
    """A bundled encoder, a folder, or a model of the Hugging Face Hub that transformers' AutoModel reads: a ViT, the
    vision tower of a CLIP, a convolutional network."""
    revision: str | None = None
    """Commit of a model of the Hub, all 40 digits."""
    pooling: Literal["mean", "first", "model"] = "mean"
    """What is made of its tokens: their mean, the first, or what the model itself makes of them."""
    train: str = "frozen"
    """Which of its weights learn: `frozen`, `last:N` blocks, or `all`."""
    copies: int = 8
    """Times that a frozen encoder looks at each training image: once as it is, and varied the other times."""
    augmentation: Augmentation = Augmentation()
    language_block: LanguageBlock | None = None
    """A frozen block of a language model behind the encoder; null: none."""
    max_bytes: int = 32_000_000
    """Largest file."""
    max_pixels: int = 64_000_000
    """Largest height times width."""

    def __post_init__(self) -> None:
        _check_revision(self.revision)
        _check_train(self.train)
        if self.copies < 1:
            raise ValueError(f"copies must be positive, got {self.copies}")


@settings
class FusionText:
    """What is written of a record, through a text encoder."""

    model_id: str = "bundled:all-minilm-l6-v2"
    """A bundled encoder, a folder, or a model of the Hugging Face Hub that transformers' AutoModel reads."""
    revision: str | None = None
    """Commit of a model of the Hub, all 40 digits."""
    template: str = "{text}"
    """What the encoder reads, as the prompt of `generative`."""
    max_length: int = 256
    """Tokens read; what is longer is cut off."""
    pooling: Literal["mean", "first"] = "mean"
    """What is made of its tokens: their mean, or the first."""
    train: str = "frozen"
    """Which of its weights learn: `frozen`, `last:N` blocks, or `all`."""

    def __post_init__(self) -> None:
        _check_revision(self.revision)
        _check_train(self.train)
        _check_template("template", self.template)


@settings
class FusionJoint:
    """Image and text through one encoder that attends across them, such as ViLT (GestaltMML: dandelin/vilt-b32-mlm)."""

    model_id: str
    """Folder of a ViLT in safetensors with its tokenizer, or its id on the Hugging Face Hub."""
    revision: str | None = None
    """Commit of a model of the Hub, all 40 digits."""
    template: str = "{text}"
    """What it reads, as the prompt of `generative`."""
    max_length: int = 40
    """Tokens read; what is longer is cut off."""
    train: str = "all"
    """Which of its weights learn: `frozen`, `last:N` blocks, or `all`."""
    copies: int = 8
    """As of `image`."""
    augmentation: Augmentation = Augmentation()
    max_bytes: int = 32_000_000
    """Largest file."""
    max_pixels: int = 64_000_000
    """Largest height times width."""

    def __post_init__(self) -> None:
        _check_revision(self.revision)
        _check_train(self.train)
        _check_template("template", self.template)


@settings
class Fusion:
    """A network over whatever a record has, image, text, coded fields and coded findings, trained on known labels."""

    kind: Literal["fusion"] = "fusion"
    image: FusionImage | None = None
    """How the image is read; null: it is not."""
    text: FusionText | None = None
    """How what is written of the record is read; null: it is not."""
    joint: FusionJoint | None = None
    """In place of `image` and `text`."""
    fields: dict[str, Literal["number", "duration", "category"]] = dataclasses.field(default_factory=dict)
    """Coded fields to read, and how: a number, an ISO 8601 duration such as `P4Y`, a word of a vocabulary. Leave out
    what gives the label away, such as the gene of a genetic disease."""
    findings: bool = False
    """Whether coded phenotypes are read, each with all that it is a kind of."""
    fusion: Literal["concat", "gated", "attention"] = "concat"
    """How the parts become one: side by side, as a mean whose weights they decide, or by attending to each other."""
    width: int = 256
    """Numbers that each part is projected to."""
    dropout: float = 0.5
    """Share of the fused numbers dropped while it learns."""
    modality_dropout: float = 0.3
    """Share of the parts hidden while it learns, so that it can answer from any of them."""
    finding_dropout: float = 0.3
    """Share of a record's findings hidden while it learns."""
    class_balanced: bool = False
    """Whether each label weighs the same, however many records it has."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all labels."""
    learning_rate: float = 1e-3
    """Of everything but the encoders."""
    encoder_learning_rate: float = 1e-4
    """Of the weights of encoders that learn."""
    weight_decay: float = 0.01
    """Of AdamW."""
    epochs: int = 40
    """Most passes over the training split."""
    patience: int = 8
    """Passes without a lower validation loss after which it stops."""
    batch_size: int = 64
    """Records of one step, on all workers together."""
    max_bad_share: float = 0.05
    """Share (0 to 1) of the labelled records whose image cannot be read above which fitting stops."""
    seed: int = 0
    """Of the first weights, and of all that is drawn while it learns."""

    def __post_init__(self) -> None:
        if not (self.image or self.text or self.joint or self.fields or self.findings):
            raise ValueError("it is to read nothing; give image, text, joint, fields or findings")
        if self.joint and (self.image or self.text):
            raise ValueError("joint reads image and text itself; leave those two out")
        for name in ("width", "epochs", "patience", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("dropout", "modality_dropout", "finding_dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("learning_rate", "encoder_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share must lie in 0 to 1, got {self.max_bad_share}")


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


AnyTeacher = Annotated[Table | Ontology | Generative | Clip | Fusion | Imported | Ensemble, Field(discriminator="kind")]
