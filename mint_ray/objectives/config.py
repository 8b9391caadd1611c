"""Settings of the objectives: ORPO, SFT, DPO, IPO, SimPO and CPO, under TRL's argument names."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mint_ray.config.loader import settings

NllOn = Literal["full", "completion"]


@settings
class Orpo:
    """Odds-ratio preference optimization (arXiv 2403.07691): likelihood of the chosen completion plus an odds ratio."""

    kind: Literal["orpo"] = "orpo"
    uses_reference: ClassVar[bool] = False
    beta: float = 0.5
    """Weight of the odds-ratio term; lambda in the paper."""
    nll_on: NllOn = "completion"
    """Tokens of the likelihood term: `completion` (the paper's equation 6) or `full`, prompt and completion (TRL)."""

    def __post_init__(self) -> None:
        _not_negative("beta", self.beta)


@settings
class Sft:
    """Supervised fine-tuning on the chosen completions; the rejected ones are not run."""

    kind: Literal["sft"] = "sft"
    uses_reference: ClassVar[bool] = False
    nll_on: NllOn = "completion"
    """Tokens of the likelihood: `completion`, or `full`, prompt and completion."""


@settings
class Dpo:
    """Direct preference optimization (arXiv 2305.18290) with the base student as the reference."""

    kind: Literal["dpo"] = "dpo"
    uses_reference: ClassVar[bool] = True
    beta: float = 0.1
    """Strength of the regularization towards the base student."""

    def __post_init__(self) -> None:
        _positive("beta", self.beta)


@settings
class Ipo:
    """Identity preference optimization (arXiv 2310.12036) with the base student as the reference."""

    kind: Literal["ipo"] = "ipo"
    uses_reference: ClassVar[bool] = True
    beta: float = 0.1
    """Strength of the regularization; tau in the paper. The target margin is 1 / (2 beta) per token."""

    def __post_init__(self) -> None:
        _positive("beta", self.beta)


@settings
class SimPo:
    """Simple preference optimization (arXiv 2405.14734): mean log-probabilities with a margin, no reference."""

    kind: Literal["simpo"] = "simpo"
    uses_reference: ClassVar[bool] = False
    beta: float = 2.0
    """Scale of the rewards."""
    simpo_gamma: float = 1.0
    """Target margin between chosen and rejected reward; gamma in the paper."""

    renamed_keys: ClassVar[dict[str, str]] = {"gamma": "simpo_gamma"}

    def __post_init__(self) -> None:
        _positive("beta", self.beta)
        _not_negative("simpo_gamma", self.simpo_gamma)


@settings
class Cpo:
    """Contrastive preference optimization (arXiv 2401.08417): preference without a reference, and likelihood."""

    kind: Literal["cpo"] = "cpo"
    uses_reference: ClassVar[bool] = False
    beta: float = 0.1
    """Scale of the rewards."""
    cpo_alpha: float = 1.0
    """Weight of the likelihood term."""
    nll_on: NllOn = "completion"
    """Tokens of the likelihood term: `completion`, or `full`, prompt and completion."""

    renamed_keys: ClassVar[dict[str, str]] = {"nll_weight": "cpo_alpha"}

    def __post_init__(self) -> None:
        _positive("beta", self.beta)
        _not_negative("cpo_alpha", self.cpo_alpha)


AnyObjective = Annotated[Orpo | Sft | Dpo | Ipo | SimPo | Cpo, Field(discriminator="kind")]


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")
