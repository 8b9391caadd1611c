"""Objectives: the losses of preference training, as float32 functions of log-probabilities.

Importing this loads no torch.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Protocol

from mint_ray.objectives.config import AnyObjective, NllOn

if TYPE_CHECKING:
    from torch import Tensor

    from mint_ray.layouts import Batch, Logps


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CompletionLogps:
    """Log-probabilities of the chosen or of the rejected completions of P pairs."""

    sums: Tensor
    """Log-probability of each completion given its prompt; float32 (or float64), shape (P,)."""
    counts: Tensor
    """Number of tokens of each completion; integer, shape (P,)."""
    reference_sums: Tensor | None = None
    """The same log-probabilities under the base student; None unless the objective needs them."""

    @property
    def means(self) -> Tensor:
        """Mean log-probability per token, log P(y|x) in ORPO; shape (P,)."""
        return self.sums / self.counts


class Objective(Protocol):
    """A loss of the form nll_weight x NLL(chosen) + mean over pairs of `pair_losses`."""

    uses_rejected: bool
    """True if training needs the rejected completions."""
    uses_reference: bool
    """True if `CompletionLogps.reference_sums` is needed."""
    nll_weight: float
    """Weight of the likelihood term; 0 if the method has none."""
    nll_on: NllOn
    """Tokens of the likelihood term."""

    def pair_losses(self, chosen: CompletionLogps, rejected: CompletionLogps) -> Tensor:
        """Return the loss of each pair without the likelihood term; float32, shape (P,)."""
        ...

    def rewards(self, completions: CompletionLogps) -> Tensor:
        """Return the implicit reward of each completion as TRL's trainer of the method logs it; float32, shape (P,)."""
        ...


def build_objective(config: AnyObjective) -> Objective:
    """Build the objective of a config."""
    from mint_ray.objectives import losses

    return losses.build(config)


def chosen_and_rejected(logps: Logps, batch: Batch) -> tuple[CompletionLogps, CompletionLogps]:
    """Return the log-probabilities of the chosen and of the rejected completion of each pair of a batch."""
    sums_C, reference_C = logps.sums, batch.get("reference_C")
    chosen, rejected = (
        CompletionLogps(
            sums=sums_C[index_P],
            counts=logps.counts[index_P],
            reference_sums=None if reference_C is None else reference_C[index_P],
        )
        for index_P in (batch["chosen_P"], batch["rejected_P"])
    )
    return chosen, rejected


def nll_sum(chosen: CompletionLogps, logps: Logps, batch: Batch) -> Tensor:
    """Return the negative log-likelihood of a batch: chosen completions and scored prompts, summed over tokens.

    A prompt counts once per pair. Divided by the batch's `nll_tokens` it is the likelihood term of the loss.
    """
    return -chosen.sums.sum() - logps.prompt_sums[batch["record_P"]].sum()
