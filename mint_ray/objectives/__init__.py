"""What a student is trained for, as float32 functions of log-probabilities."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Protocol

from mint_ray.objectives.config import AnyObjective, NllOn

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """One side of P pairs, chosen or rejected, as the student sees it."""

    sums_P: Tensor
    """Log-probability of each completion given its prompt; float32 (or float64), shape (P,)."""
    counts_P: Tensor
    """Tokens of each completion, integer, shape (P,)."""
    reference_sums_P: Tensor | None = None
    """The same log-probability under the base student; None unless the objective asks for it."""

    @property
    def means_P(self) -> Tensor:
        """Mean log-probability per token; log P(y|x) in ORPO."""
        return self.sums_P / self.counts_P


class Objective(Protocol):
    """A loss of the form nll_weight x NLL(chosen) + mean over pairs of `pair_losses`."""

    uses_rejected: bool
    """Whether the rejected completions are looked at in training."""
    uses_reference: bool
    """Whether `Answers.reference_sums_P` is needed."""
    nll_weight: float
    """Weight of the likelihood term; 0 where the method has none."""
    nll_on: NllOn
    """Tokens of the likelihood term."""

    def pair_losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        """Loss of each pair but for the likelihood term, float32, shape (P,)."""
        ...

    def rewards(self, side: Answers) -> Tensor:
        """Implicit reward of each completion as TRL's trainer of this method logs it, float32, shape (P,)."""
        ...


def build_objective(config: AnyObjective) -> Objective:
    """The live objective of a config."""
    from mint_ray.objectives import losses

    return losses.build(config)
