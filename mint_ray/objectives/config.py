"""Say what a student is trained for: ORPO or one of its rivals, each with its own weights."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from mint_ray.config.loader import settings

NllOn = Literal["full", "completion"]


@settings
class Orpo:
    """Odds-ratio preference optimisation (arXiv 2403.07691): likelihood of one answer, and odds against the other."""

    kind: Literal["orpo"] = "orpo"
    beta: float = 0.5
    """Weight of the odds-ratio term; lambda in the paper, `beta` in TRL."""
    nll_on: NllOn = "completion"
    """Tokens of the likelihood term: the completion (the paper's equation 6) or prompt and completion (TRL)."""

    def __post_init__(self) -> None:
        _not_negative("beta", self.beta)


@settings
class Sft:
    """Supervised fine-tuning on the chosen answers; the rejected ones are not run."""

    kind: Literal["sft"] = "sft"
    nll_on: NllOn = "completion"
    """Tokens of the likelihood: the completion, or prompt and completion."""


@settings
class Dpo:
    """Direct preference optimisation (arXiv 2305.18290), against the base student."""

    kind: Literal["dpo"] = "dpo"
    beta: float = 0.1
    """How strongly the student is held to the base student; larger holds it closer."""

    def __post_init__(self) -> None:
        _positive("beta", self.beta)


@settings
class Ipo:
    """Identity preference optimisation (arXiv 2310.12036), against the base student."""

    kind: Literal["ipo"] = "ipo"
    beta: float = 0.1
    """Regularisation; tau in the paper, `beta` in TRL. The margin aimed at is 1 / (2 beta) per token."""

    def __post_init__(self) -> None:
        _positive("beta", self.beta)


@settings
class SimPo:
    """Simple preference optimisation (arXiv 2405.14734): mean log-probabilities with a margin, no reference."""

    kind: Literal["simpo"] = "simpo"
    beta: float = 2.0
    """Scale of the rewards."""
    gamma: float = 1.0
    """Margin by which the chosen reward should lead; `simpo_gamma` in TRL."""

    def __post_init__(self) -> None:
        _positive("beta", self.beta)
        _not_negative("gamma", self.gamma)


@settings
class Cpo:
    """Contrastive preference optimisation (arXiv 2401.08417): preference without a reference, and the likelihood."""

    kind: Literal["cpo"] = "cpo"
    beta: float = 0.1
    """Scale of the rewards."""
    nll_weight: float = 1.0
    """Weight of the likelihood term; `cpo_alpha` in TRL."""
    nll_on: NllOn = "completion"
    """Tokens of the likelihood term: the completion, or prompt and completion."""

    def __post_init__(self) -> None:
        _positive("beta", self.beta)
        _not_negative("nll_weight", self.nll_weight)


AnyObjective = Annotated[Orpo | Sft | Dpo | Ipo | SimPo | Cpo, Field(discriminator="kind")]


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")
