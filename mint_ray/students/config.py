"""Settings of the student: its base model, the adapter, and the generation of answers."""

from __future__ import annotations

from typing import ClassVar, Literal

from mint_ray.config.loader import settings
from mint_ray.records import Mode

Component = Literal["language", "projector", "vision"]
"""Component of a vision-language student: the language model, the projector that maps image features to its tokens, or
the vision encoder."""


@settings
class Student:
    """The language model that is aligned: its base checkpoint and its LoRA adapter."""

    model_id: str
    """Id on the Hugging Face Hub, a folder, a URI in object storage, a bundled model such as
    `bundled:smollm2-135m-instruct`, or `built`: the model that the section `build_vlm` builds. Whether it takes images
    follows from its `config.json`."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; a commit pins the weights. null: `main`."""
    lora_rank: int | None = 16
    """Rank r of the LoRA weights; null trains every weight of the model, or of the components below."""
    lora_alpha: int = 32
    """The LoRA update is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Dropout probability of the adapter's inputs during training."""
    target_modules: str = "all-linear"
    """Layers that get LoRA weights, as in PEFT: `all-linear`, or a regular expression that matches module names."""
    lora_components: tuple[Component, ...] = ("language",)
    """Components of a vision-language student that get LoRA weights. A text student has one component."""
    modules_to_save: tuple[Component, ...] = ("projector",)
    """Components of a vision-language student that are trained in full, as PEFT's `modules_to_save`. Components in
    neither list are frozen."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the base weights; in float32, answers do not depend on the batch."""

    renamed_keys: ClassVar[dict[str, str]] = {"lora_parts": "lora_components", "whole_parts": "modules_to_save"}

    def __post_init__(self) -> None:
        if not self.model_id.strip():
            raise ValueError(f"model_id must name a model, got {self.model_id!r}")
        if self.revision is not None and self.model_id.startswith("bundled:"):
            raise ValueError(f"revision is for models on the Hub; {self.model_id} has none, got {self.revision!r}")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"lora_rank must be positive or null, got {self.lora_rank}")
        if self.lora_alpha < 1:
            raise ValueError(f"lora_alpha must be positive, got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be at least 0 and below 1, got {self.lora_dropout}")
        if not self.lora_components:
            raise ValueError("lora_components must name a component, got none; lora_rank null trains them in full")
        if both := set(self.lora_components) & set(self.modules_to_save):
            names = ", ".join(sorted(both))
            raise ValueError(f"lora_components and modules_to_save must be disjoint, got {names} in both")
        if not self.target_modules.strip():
            raise ValueError(f"target_modules must name layers, got {self.target_modules!r}")


@settings
class Generation:
    """Generation of answers; always deterministic, so that the same student and prompt give the same answer."""

    modes: tuple[Mode, ...] = ("free",)
    """Answering modes, each a method of its own in the report. `free`: greedy decoding; always included, because the
    report compares it. `constrained`: greedy decoding among the answers that name as many labels as the task asks for.
    `rank`: all labels, ordered by the likelihood of their name as the first of the answer."""
    max_new_tokens: int = 96
    """Maximum length of a free answer, in tokens."""
    length_normalization: Literal["mean", "sum"] = "sum"
    """Score of a label in `rank`: the sum of the log-probabilities of its name's tokens, whose softmax is the
    probability of the answer; or their mean, which does not favor short names."""

    renamed_keys: ClassVar[dict[str, str]] = {"normalise": "length_normalization"}

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be positive, got {self.max_new_tokens}")
        if "free" not in self.modes or len(set(self.modes)) < len(self.modes):
            raise ValueError(f"modes must include free and no mode twice, got {', '.join(self.modes) or 'none'}")
