"""Settings of the teachers.

Tested by tests/teachers/test_config.py.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mint_ray.config.loader import settings

PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
"""Placeholder of a text template, such as `{text}` or `{fields.age}`."""


@settings
class Table:
    """Scores computed elsewhere, read from a file: one row per record and label."""

    kind: Literal["table"] = "table"
    uri: str
    """Parquet, CSV or JSONL file with the columns `record_id`, `label_id`, `score` (higher is better)."""


@settings
class Ontology:
    """Semantic similarity between a patient's coded phenotypes and the annotated disease profiles."""

    kind: Literal["ontology"] = "ontology"
    absent_weight: float = 0.1
    """Weight of the penalty for excluded phenotypes that the disease would show."""
    default_frequency: float = 0.5
    """Share of patients (0 to 1) assumed for an annotation without a frequency."""

    renamed_keys: ClassVar[dict[str, str]] = {"unknown_frequency": "default_frequency"}

    def __post_init__(self) -> None:
        if self.absent_weight < 0:
            raise ValueError(f"absent_weight must not be negative, got {self.absent_weight}")
        if not 0 < self.default_frequency <= 1:
            raise ValueError(f"default_frequency must be above 0 and at most 1, got {self.default_frequency}")


@settings
class Generative:
    """A language model that scores each label's name by its likelihood as the answer to a prompt."""

    kind: Literal["generative"] = "generative"
    model_id: str
    """Folder of a causal language model in safetensors with its tokenizer, or its id on the Hugging Face Hub."""
    revision: str | None = None
    """Commit of a model of the Hub, all 40 digits, so that the scores are reproducible; null for a folder."""
    show_image: bool = False
    """True to put the record's image ahead of the prompt, for a model that takes images and text (LLaVA, Qwen-VL,
    Llama 3.2 Vision and others) with its processor. Records without an image are scored by the prompt alone."""
    prompt: str = (
        "{text}\nFindings: {phenotypes}.\nAbsent: {excluded_phenotypes}.\n\n"
        "Which disease is most likely? Answer with its name."
    )
    """Prompt template. `{text}`, `{phenotypes}` and `{excluded_phenotypes}` (names of the coded phenotypes) and
    `{fields.age}` (or another coded field) are replaced by the record's values, or by nothing if it has none. The model
    reads only what the template names."""
    length_normalization: Literal["mean", "sum"] = "mean"
    """Score of a name: the mean of the log-probabilities of its tokens and the end token, or their sum, which favors
    short names."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the weights and the computation."""

    renamed_keys: ClassVar[dict[str, str]] = {"shows_image": "show_image", "normalise": "length_normalization"}

    def __post_init__(self) -> None:
        _check_template("prompt", self.prompt, may_be_plain=self.show_image)
        _check_revision(self.revision)


@settings
class Clip:
    """A model of the CLIP family (CLIP, SigLIP, PLIP), which embeds images and texts in one space."""

    kind: Literal["clip"] = "clip"
    model_id: str
    """Folder of the model in safetensors with its tokenizer and `preprocessor_config.json`, or its id on the Hugging
    Face Hub, such as `vinid/plip`."""
    revision: str | None = None
    """Commit of a model of the Hub, all 40 digits, so that the scores are reproducible; null for a folder."""
    mode: Literal["zero_shot", "linear_probe"] = "zero_shot"
    """`zero_shot`: cosine similarity between the image and the names of the labels; `linear_probe`: logistic regression
    on the features of the training images, with balanced class weights."""
    templates: tuple[str, ...] = ("a photo of {}.",)
    """Prompt templates of `zero_shot`, with `{}` for a name. The embedding of a label is the mean over its name and
    synonyms in all templates."""
    inverse_regularization: float | None = None
    """Inverse regularization strength of the linear probe (C of scikit-learn's LogisticRegression); null: chosen on
    the validation split."""
    text_template: str | None = None
    """Template of a text read in addition to the image, with the placeholders of the `generative` teacher's `prompt`.
    It is truncated to the model's context length. Null: no text."""
    text_weight: float = 0.5
    """Weight of the text's log-probabilities (0 to 1) for records with image and text; with one of them, that one is
    used alone."""
    calibrate: bool = True
    """True to fit a temperature on the labels of the validation split, if there are any."""
    max_bytes: int = 32_000_000
    """Maximum size of an image file, in bytes."""
    max_pixels: int = 64_000_000
    """Maximum height times width of an image."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the weights and the computation."""

    renamed_keys: ClassVar[dict[str, str]] = {"c": "inverse_regularization"}

    def __post_init__(self) -> None:
        if not self.templates:
            raise ValueError("templates must not be empty")
        for template in self.templates:
            if template.count("{}") != 1:
                raise ValueError(f"templates: expected one {{}} for the label's name, got {template!r}")
        if self.text_template is not None:
            _check_template("text_template", self.text_template)
        if not 0 < self.text_weight < 1:
            raise ValueError(f"text_weight must be between 0 and 1, got {self.text_weight}")
        if self.inverse_regularization is not None and not 0 < self.inverse_regularization < math.inf:
            raise ValueError(f"inverse_regularization must be positive and finite, got {self.inverse_regularization}")
        _check_positive(self, "max_bytes", "max_pixels")
        _check_revision(self.revision)


@settings
class TwoTower:
    """A two-tower model of the CLIP family as an encoder of images and texts; not a teacher."""

    model_id: str
    """Folder of the model, or its id on the Hugging Face Hub, as for the `clip` teacher."""
    revision: str | None = None
    """Commit of a model of the Hub, all 40 digits; null for a folder."""
    max_bytes: int = 32_000_000
    """Maximum size of an image file, in bytes."""
    max_pixels: int = 64_000_000
    """Maximum height times width of an image."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the weights and the computation."""

    def __post_init__(self) -> None:
        _check_positive(self, "max_bytes", "max_pixels")
        _check_revision(self.revision)


@settings
class LanguageBlock:
    """A frozen transformer block of a language model, applied to an image encoder's tokens (arXiv 2403.17343).

    A trained linear layer precedes it, another follows it.
    """

    model_id: str
    """Folder of a Llama-like causal language model in safetensors, or its id on the Hugging Face Hub."""
    revision: str | None = None
    """Commit of a model of the Hub, all 40 digits."""
    layer: int = -1
    """Index of the block, from 0; negative numbers count from the last."""

    def __post_init__(self) -> None:
        _check_revision(self.revision)


@settings
class Augmentation:
    """Random transformations of the training images; turn off any that changes the label of an image."""

    horizontal_flip: bool = True
    """True to mirror half of the images."""
    rotate90: bool = True
    """True to rotate by 0, 90, 180 or 270 degrees."""
    min_crop_scale: float = 0.8
    """Minimum side of a random crop, as a share of the image's side; 1 disables cropping."""
    color_jitter: float = 0.1
    """Maximum relative change of brightness, contrast and saturation; 0 disables it."""

    renamed_keys: ClassVar[dict[str, str]] = {
        "flip": "horizontal_flip",
        "turn": "rotate90",
        "crop": "min_crop_scale",
        "colour": "color_jitter",
    }

    def __post_init__(self) -> None:
        if not 0 < self.min_crop_scale <= 1:
            raise ValueError(f"min_crop_scale must be above 0 and at most 1, got {self.min_crop_scale}")
        if not 0 <= self.color_jitter < 1:
            raise ValueError(f"color_jitter must be at least 0 and below 1, got {self.color_jitter}")


@settings
class FusionImage:
    """Image encoder of a fusion teacher."""

    model_id: str = "bundled:efficientnet-lite0"
    """A bundled encoder, a folder, or a model of the Hugging Face Hub that transformers' AutoModel loads: a ViT, the
    vision tower of a CLIP, a convolutional network."""
    revision: str | None = None
    """Commit of a model of the Hub, all 40 digits."""
    pooling: Literal["mean", "cls", "pooler"] = "mean"
    """Pooling of the encoder's tokens: their mean, the first (CLS) token, or the model's own `pooler_output`."""
    trainable: str = "frozen"
    """Weights of the encoder that are trained: none (`frozen`), the last N blocks (`last:N`), or `all`."""
    num_augmentations: int = 8
    """Versions of each training image whose features are cached if the encoder is frozen: the original and
    `num_augmentations - 1` augmented ones. A trained encoder gets a new augmentation in every epoch."""
    augmentation: Augmentation = Augmentation()
    language_block: LanguageBlock | None = None
    """A frozen block of a language model on top of the encoder; null: none."""
    max_bytes: int = 32_000_000
    """Maximum size of an image file, in bytes."""
    max_pixels: int = 64_000_000
    """Maximum height times width of an image."""

    renamed_keys: ClassVar[dict[str, str]] = {"train": "trainable", "copies": "num_augmentations"}

    def __post_init__(self) -> None:
        _check_revision(self.revision)
        _check_trainable(self.trainable)
        _check_positive(self, "num_augmentations", "max_bytes", "max_pixels")


@settings
class FusionText:
    """Text encoder of a fusion teacher."""

    model_id: str = "bundled:all-minilm-l6-v2"
    """A bundled encoder, a folder, or a model of the Hugging Face Hub that transformers' AutoModel loads."""
    revision: str | None = None
    """Commit of a model of the Hub, all 40 digits."""
    template: str = "{text}"
    """Template of the text, with the placeholders of the `generative` teacher's `prompt`."""
    max_length: int = 256
    """Maximum number of tokens; longer texts are truncated."""
    pooling: Literal["mean", "cls"] = "mean"
    """Pooling of the encoder's tokens: their mean, or the first (CLS) token."""
    trainable: str = "frozen"
    """Weights of the encoder that are trained: none (`frozen`), the last N blocks (`last:N`), or `all`."""

    renamed_keys: ClassVar[dict[str, str]] = {"train": "trainable"}

    def __post_init__(self) -> None:
        _check_revision(self.revision)
        _check_trainable(self.trainable)
        _check_template("template", self.template)


@settings
class FusionJoint:
    """Encoder that attends across image and text, such as ViLT (GestaltMML: dandelin/vilt-b32-mlm)."""

    model_id: str
    """Folder of a ViLT in safetensors with its tokenizer, or its id on the Hugging Face Hub."""
    revision: str | None = None
    """Commit of a model of the Hub, all 40 digits."""
    template: str = "{text}"
    """Template of the text, with the placeholders of the `generative` teacher's `prompt`."""
    max_length: int = 40
    """Maximum number of tokens; longer texts are truncated."""
    trainable: str = "all"
    """Weights of the encoder that are trained: none (`frozen`), the last N blocks (`last:N`), or `all`."""
    num_augmentations: int = 8
    """Versions of each training image, as for `image`."""
    augmentation: Augmentation = Augmentation()
    max_bytes: int = 32_000_000
    """Maximum size of an image file, in bytes."""
    max_pixels: int = 64_000_000
    """Maximum height times width of an image."""

    renamed_keys: ClassVar[dict[str, str]] = {"train": "trainable", "copies": "num_augmentations"}

    def __post_init__(self) -> None:
        _check_revision(self.revision)
        _check_trainable(self.trainable)
        _check_template("template", self.template)
        _check_positive(self, "num_augmentations", "max_bytes", "max_pixels")


@settings
class Fusion:
    """A network over the image, text, coded fields and coded phenotypes of a record, trained on known labels."""

    kind: Literal["fusion"] = "fusion"
    image: FusionImage | None = None
    """Image encoder; null: the image is not read."""
    text: FusionText | None = None
    """Text encoder; null: the text is not read."""
    joint: FusionJoint | None = None
    """Joint encoder of image and text, in place of `image` and `text`; null: none."""
    fields: dict[str, Literal["number", "duration", "category"]] = dataclasses.field(default_factory=dict)
    """Coded fields to read and their types: a number, an ISO 8601 duration such as `P4Y`, or a category. Leave out
    fields that give the label away, such as the gene of a genetic disease."""
    phenotypes: bool = False
    """True to read the coded phenotypes, each with all its ancestors in the ontology."""
    fusion: Literal["concat", "gated", "attention"] = "concat"
    """Fusion of the modalities: concatenation, a mean with learned weights, or attention."""
    hidden_size: int = 256
    """Size of the projection of each modality."""
    dropout: float = 0.5
    """Share of the fused features that is dropped during training."""
    modality_dropout: float = 0.3
    """Share of the modalities that is hidden during training, so that the teacher can answer from any of them."""
    phenotype_dropout: float = 0.3
    """Share of a record's phenotypes that is hidden during training."""
    class_balanced: bool = False
    """True to give each label the same weight in the loss, whatever its number of records."""
    label_smoothing: float = 0.0
    """Share of the target probability that is spread over all labels."""
    learning_rate: float = 1e-3
    """Peak learning rate of all weights except those of the encoders."""
    encoder_learning_rate: float = 1e-4
    """Peak learning rate of the encoders' trainable weights."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    num_train_epochs: int = 40
    """Maximum number of passes over the training split."""
    early_stopping_patience: int = 8
    """Epochs without a lower validation loss after which training stops."""
    train_batch_size: int = 64
    """Records per optimizer step, over all workers."""
    max_bad_share: float = 0.05
    """Maximum share (0 to 1) of labelled records whose image cannot be read; above it fitting stops."""
    seed: int = 0
    """Seed of the initial weights and of all random draws during training."""

    renamed_keys: ClassVar[dict[str, str]] = {
        "findings": "phenotypes",
        "width": "hidden_size",
        "finding_dropout": "phenotype_dropout",
        "epochs": "num_train_epochs",
        "patience": "early_stopping_patience",
        "batch_size": "train_batch_size",
    }

    def __post_init__(self) -> None:
        if not (self.image or self.text or self.joint or self.fields or self.phenotypes):
            raise ValueError("no input; give image, text, joint, fields or phenotypes")
        if self.joint and (self.image or self.text):
            raise ValueError("joint reads image and text itself; leave out image and text")
        _check_positive(self, "hidden_size", "num_train_epochs", "early_stopping_patience", "train_batch_size")
        _check_positive(self, "learning_rate", "encoder_learning_rate")
        for name in ("dropout", "modality_dropout", "phenotype_dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share must be between 0 and 1, got {self.max_bad_share}")


@settings
class Imported:
    """A teacher from a module of yours. Its code runs in every process that fits or scores with it."""

    kind: Literal["import"] = "import"
    path: str
    """`package.module:Class`; the module must be installed or on PYTHONPATH on every node of the cluster. The class
    implements `mint_ray.teachers.ImportableTeacher`."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword arguments of the class. Every manifest repeats them, so pass secrets in the environment instead."""

    def __post_init__(self) -> None:
        module, colon, name = self.path.partition(":")
        if not colon or not all(part.isidentifier() for part in [*module.split("."), *name.split(".")]):
            raise ValueError(f"path must be package.module:Class, got {self.path!r}")


@settings
class Member:
    """One teacher of an ensemble."""

    teacher: AnyTeacher
    """Settings of the teacher."""
    weight: float | None = None
    """Weight relative to the other members; null: 1. Must be null if the ensemble learns its weights."""
    temperature: float = 1.0
    """Divisor of the scores ahead of the softmax: below 1 sharpens, above 1 flattens."""
    labels: tuple[str, ...] = ()
    """Ids of the task's labels that this member scores; empty: all."""

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise ValueError(f"weight must be positive and finite, got {self.weight}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")


@settings
class Ensemble:
    """An ensemble of teachers: the weighted mean of their softmax-normalized scores."""

    kind: Literal["ensemble"] = "ensemble"
    members: tuple[Member, ...]
    """Teachers of the ensemble, two or more."""
    weights: Literal["given", "learned"] = "given"
    """`given`: the members' `weight`; `learned`: the weights of maximum likelihood on the validation split."""

    def __post_init__(self) -> None:
        if len(self.members) < 2:
            raise ValueError(f"members must be two or more, got {len(self.members)}")
        if self.weights == "learned" and any(member.weight is not None for member in self.members):
            raise ValueError("weights: learned, but a member has a weight; leave it out")


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}")


def _check_revision(revision: str | None) -> None:
    if revision is not None and not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(f"revision must be a commit of 40 hexadecimal digits, got {revision!r}")


def _check_template(name: str, template: str, *, may_be_plain: bool = False) -> None:
    known = "{text}, {phenotypes}, {excluded_phenotypes}, {fields.NAME}"
    renamed = {"findings": "phenotypes", "absent": "excluded_phenotypes"}
    for placeholder in PLACEHOLDER.findall(template):
        if placeholder in ("text", "phenotypes", "excluded_phenotypes") or re.fullmatch(r"fields\.\w+", placeholder):
            continue
        hint = f"did you mean {{{renamed[placeholder]}}}?" if placeholder in renamed else f"known: {known}"
        raise ValueError(f"{name}: unknown placeholder {{{placeholder}}}; {hint}")
    if not (may_be_plain or PLACEHOLDER.search(template)):
        raise ValueError(f"{name}: no placeholder for a part of the record; known: {known}")


def _check_trainable(trainable: str) -> None:
    if not re.fullmatch(r"frozen|all|last:[1-9]\d*", trainable):
        raise ValueError(f"trainable must be frozen, all or last:N, got {trainable!r}")


AnyTeacher = Annotated[Table | Ontology | Generative | Clip | Fusion | Imported | Ensemble, Field(discriminator="kind")]
