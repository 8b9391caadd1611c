"""Losses of preference pairs and rewards of answers, as stable functions of log-probabilities.

Every function takes one number per pair or answer, shape (P,), works in float32 (float64 stays), and gives shape (P,).
"""

from __future__ import annotations

import math
from typing import assert_never

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mint_ray.objectives import Answers, Objective
from mint_ray.objectives.config import AnyObjective, Cpo, Dpo, Ipo, NllOn, Orpo, Sft, SimPo

NEAREST_TO_CERTAIN = -1e-6
"""Log-probabilities above this are taken as this: log(1 - e^x) and its slope 1/x run off to infinity at 0."""


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, any shape; stable on both sides of -ln 2.

    Values above `NEAREST_TO_CERTAIN` are clamped to it, with zero gradient.
    """
    x = _full_precision(x).clamp(max=NEAREST_TO_CERTAIN)
    return torch.where(x < -math.log(2), torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))


def log_odds_ratio(chosen_means_P: Tensor, rejected_means_P: Tensor) -> Tensor:
    """Log of the odds of `chosen` over those of `rejected`, odds being P / (1 - P): arXiv 2403.07691, equations 4, 5.

    Takes mean log-probabilities per token (equation 3). TRL does not clamp, and gives infinity for a certain answer.
    """
    chosen, rejected = _full_precision(chosen_means_P), _full_precision(rejected_means_P)
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


def odds_ratio_losses(chosen_means_P: Tensor, rejected_means_P: Tensor) -> Tensor:
    """-log sigmoid of the log odds ratio: arXiv 2403.07691, equation 7."""
    return -logsigmoid(log_odds_ratio(chosen_means_P, rejected_means_P))


def dpo_losses(chosen_log_ratios_P: Tensor, rejected_log_ratios_P: Tensor, beta: float) -> Tensor:
    """-log sigmoid of the difference of rewards: arXiv 2305.18290, equation 7.

    Takes the log-probability of each answer less that under the reference, both summed over its tokens.
    """
    return -logsigmoid(beta * (_full_precision(chosen_log_ratios_P) - _full_precision(rejected_log_ratios_P)))


def ipo_losses(chosen_mean_log_ratios_P: Tensor, rejected_mean_log_ratios_P: Tensor, beta: float) -> Tensor:
    """Squared distance of the difference from 1 / (2 beta): arXiv 2310.12036, equation 17, with `beta` for tau.

    Takes log ratios to the reference per token. The paper writes them of whole answers; TRL divides by the number of
    tokens, which (a comment in its DPOTrainer) the paper's authors confirmed as what their results are of. So do we.
    """
    margin = _full_precision(chosen_mean_log_ratios_P) - _full_precision(rejected_mean_log_ratios_P)
    return (margin - 1 / (2 * beta)) ** 2


def simpo_losses(chosen_means_P: Tensor, rejected_means_P: Tensor, beta: float, gamma: float) -> Tensor:
    """-log sigmoid of the difference of rewards less the margin `gamma`: arXiv 2405.14734, equation 6.

    Takes mean log-probabilities per token.
    """
    return -logsigmoid(beta * (_full_precision(chosen_means_P) - _full_precision(rejected_means_P)) - gamma)


def cpo_losses(chosen_sums_P: Tensor, rejected_sums_P: Tensor, beta: float) -> Tensor:
    """-log sigmoid of the difference of rewards without a reference: arXiv 2401.08417, equation 3.

    Takes log-probabilities summed over tokens.
    """
    return -logsigmoid(beta * (_full_precision(chosen_sums_P) - _full_precision(rejected_sums_P)))


class OrpoObjective:
    """Likelihood of the chosen answer, and `beta` times the odds-ratio loss: arXiv 2403.07691, equation 6."""

    uses_rejected = True
    uses_reference = False
    nll_weight = 1.0

    def __init__(self, config: Orpo) -> None:
        self.nll_on = config.nll_on
        self._beta = config.beta

    def pair_losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        """Odds-ratio losses of mean log-probabilities."""
        return self._beta * odds_ratio_losses(chosen.means_P, rejected.means_P)

    def rewards(self, side: Answers) -> Tensor:
        """`beta` times the mean log-probability."""
        return self._beta * _full_precision(side.means_P)


class SftObjective:
    """Likelihood of the chosen answer and nothing else."""

    uses_rejected = False
    uses_reference = False
    nll_weight = 1.0

    def __init__(self, config: Sft) -> None:
        self.nll_on = config.nll_on

    def pair_losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        """Zeros."""
        return torch.zeros_like(_full_precision(chosen.sums_P))

    def rewards(self, side: Answers) -> Tensor:
        """The mean log-probability. TRL's SFTTrainer has no rewards; these rank answers as those of ORPO do."""
        return _full_precision(side.means_P)


class DpoObjective:
    """Log-probabilities of whole answers, each against that of the reference."""

    uses_rejected = True
    uses_reference = True
    nll_weight = 0.0
    nll_on: NllOn = "completion"

    def __init__(self, config: Dpo) -> None:
        self._beta = config.beta

    def pair_losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        """See `dpo_losses`. Raises ValueError without a reference."""
        return dpo_losses(_log_ratios(chosen), _log_ratios(rejected), self._beta)

    def rewards(self, side: Answers) -> Tensor:
        """`beta` times the log ratio to the reference. Raises ValueError without a reference."""
        return self._beta * _log_ratios(side)


class IpoObjective:
    """Log-probabilities per token, each against that of the reference, at a set distance."""

    uses_rejected = True
    uses_reference = True
    nll_weight = 0.0
    nll_on: NllOn = "completion"

    def __init__(self, config: Ipo) -> None:
        self._beta = config.beta

    def pair_losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        """See `ipo_losses`. Raises ValueError without a reference."""
        return ipo_losses(_log_ratios(chosen) / chosen.counts_P, _log_ratios(rejected) / rejected.counts_P, self._beta)

    def rewards(self, side: Answers) -> Tensor:
        """`beta` times the log ratio of the whole answer, as TRL logs it, although its loss takes means.

        Raises ValueError without a reference.
        """
        return self._beta * _log_ratios(side)


class SimPoObjective:
    """Log-probabilities per token with a margin between chosen and rejected."""

    uses_rejected = True
    uses_reference = False
    nll_weight = 0.0
    nll_on: NllOn = "completion"

    def __init__(self, config: SimPo) -> None:
        self._beta, self._gamma = config.beta, config.gamma

    def pair_losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        """See `simpo_losses`."""
        return simpo_losses(chosen.means_P, rejected.means_P, self._beta, self._gamma)

    def rewards(self, side: Answers) -> Tensor:
        """`beta` times the mean log-probability."""
        return self._beta * _full_precision(side.means_P)


class CpoObjective:
    """Log-probabilities of whole answers against each other, and the likelihood of the chosen one.

    The paper adds up the likelihood of an answer's tokens; TRL takes their mean, and so do we.
    """

    uses_rejected = True
    uses_reference = False

    def __init__(self, config: Cpo) -> None:
        self.nll_weight = config.nll_weight
        self.nll_on = config.nll_on
        self._beta = config.beta

    def pair_losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        """See `cpo_losses`."""
        return cpo_losses(chosen.sums_P, rejected.sums_P, self._beta)

    def rewards(self, side: Answers) -> Tensor:
        """`beta` times the log-probability."""
        return self._beta * _full_precision(side.sums_P)


def build(config: AnyObjective) -> Objective:
    """The live objective of a config."""
    match config:
        case Orpo():
            return OrpoObjective(config)
        case Sft():
            return SftObjective(config)
        case Dpo():
            return DpoObjective(config)
        case Ipo():
            return IpoObjective(config)
        case SimPo():
            return SimPoObjective(config)
        case Cpo():
            return CpoObjective(config)
        case _:
            assert_never(config)


def _log_ratios(side: Answers) -> Tensor:
    """Log-probability of each answer less that under the reference."""
    if side.reference_sums_P is None:
        raise ValueError("the objective needs log-probabilities of a reference, and got none")
    return _full_precision(side.sums_P) - _full_precision(side.reference_sums_P)


def _full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
