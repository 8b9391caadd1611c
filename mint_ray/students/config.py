"""Say which language model is taught, with which adapter, and how it answers."""

from __future__ import annotations

from typing import Literal

from mint_ray.config.loader import settings

Part = Literal["language", "projector", "vision"]
"""Of a student that sees: the language model; what turns the features of an image into its tokens; what sees them."""


@settings
class Student:
    """The language model that learns: its base checkpoint and the low-rank weights laid over it."""

    model_id: str
    """A hub id, a folder, here or in object storage, a bundled student such as `bundled:smollm2-135m-instruct`, or
    `joined`: the one that the section `join` makes. Its `config.json` says whether it sees images."""
    revision: str | None = None
    """Branch, tag or commit on the hub; give the commit to pin the weights. None takes `main`."""
    lora_rank: int | None = 16
    """Rank r of the LoRA weights; None trains every weight of the model, or of the parts below."""
    lora_alpha: int = 32
    """The LoRA update is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Share of the adapter's inputs dropped while it trains."""
    target_modules: str = "all-linear"
    """Which layers get LoRA weights, as PEFT reads it: `all-linear`, or a regular expression over module names."""
    lora_parts: tuple[Part, ...] = ("language",)
    """Parts of a student that sees which get LoRA weights; one that reads has only one part."""
    whole_parts: tuple[Part, ...] = ("projector",)
    """Parts of a student that sees which are trained in every weight. What is in neither list stays as it is."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the base weights; float32 answers do not depend on how prompts are batched."""

    def __post_init__(self) -> None:
        if not self.model_id.strip():
            raise ValueError(f"model_id must name a model, got {self.model_id!r}")
        if self.revision is not None and self.model_id.startswith("bundled:"):
            raise ValueError(f"revision is for hub models; {self.model_id} is one fixed file, got {self.revision!r}")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"lora_rank must be positive or null, got {self.lora_rank}")
        if self.lora_alpha < 1:
            raise ValueError(f"lora_alpha must be positive, got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be at least 0 and below 1, got {self.lora_dropout}")
        if not self.lora_parts:
            raise ValueError("lora_parts must name a part, got none; with lora_rank null all of it is trained")
        if both := set(self.lora_parts) & set(self.whole_parts):
            raise ValueError(f"lora_parts and whole_parts must differ, both name {', '.join(sorted(both))}")
        if not self.target_modules.strip():
            raise ValueError(f"target_modules must name layers, got {self.target_modules!r}")


Mode = Literal["free", "constrained", "rank"]


@settings
class Generation:
    """How a student answers: never by chance, so that the same student and prompt give the same answer."""

    modes: tuple[Mode, ...] = ("free",)
    """Each is a method of its own. `free`: greedily, whatever comes; what the report compares, so it is always there.
    `constrained`: greedily among the answers that name as many labels as are asked for, and nothing else. `rank`: every
    label, by how likely its name is as the first of the answer."""
    max_new_tokens: int = 96
    """Longest free answer, in tokens."""
    normalise: Literal["mean", "sum"] = "sum"
    """What `rank` orders by: the log-probability of a name, so that its probabilities are those of the answer; or the
    mean by token, which does not favour short names."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be positive, got {self.max_new_tokens}")
        if "free" not in self.modes or len(set(self.modes)) < len(self.modes):
            raise ValueError(f"modes must name free, and each mode once, got {', '.join(self.modes) or 'none'}")
