"""Losses of preference pairs and rewards of completions, as numerically stable functions of log-probabilities.

Every function takes one number per pair or completion, shape (P,), computes in float32 (or in float64 if given float64)
and returns shape (P,).
"""

from __future__ import annotations

import math
from typing import assert_never

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mint_ray.objectives import CompletionLogps, Objective
from mint_ray.objectives.config import AnyObjective, Cpo, Dpo, Ipo, NllOn, Orpo, Sft, SimPo

MAX_LOG_PROBABILITY = -1e-6
"""Upper bound to which log-probabilities are clamped: log(1 - e^x) and its slope 1/x diverge at 0."""


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - e^x) for x <= 0, any shape; stable on both sides of -ln 2.

    Values above `MAX_LOG_PROBABILITY` are clamped to it, with zero gradient.
    """
    x = _full_precision(x).clamp(max=MAX_LOG_PROBABILITY)
    return torch.where(x < -math.log(2), torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))


def log_odds_ratio(chosen_means_P: Tensor, rejected_means_P: Tensor) -> Tensor:
    """Return the log odds ratio of chosen over rejected, odds being P / (1 - P): arXiv 2403.07691, equations 4 and 5.

    Takes mean log-probabilities per token (equation 3). TRL does not clamp, and returns infinity for a completion of
    probability 1.
    """
    chosen, rejected = _full_precision(chosen_means_P), _full_precision(rejected_means_P)
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


def odds_ratio_losses(chosen_means_P: Tensor, rejected_means_P: Tensor) -> Tensor:
    """Return -log sigmoid of the log odds ratio: arXiv 2403.07691, equation 7."""
    return -logsigmoid(log_odds_ratio(chosen_means_P, rejected_means_P))


def dpo_losses(chosen_log_ratios_P: Tensor, rejected_log_ratios_P: Tensor, beta: float) -> Tensor:
    """Return -log sigmoid of the difference of rewards: arXiv 2305.18290, equation 7.

    Takes the log-probability of each completion minus that under the reference, both summed over its tokens.
    """
    return -logsigmoid(beta * (_full_precision(chosen_log_ratios_P) - _full_precision(rejected_log_ratios_P)))


def ipo_losses(chosen_mean_log_ratios_P: Tensor, rejected_mean_log_ratios_P: Tensor, beta: float) -> Tensor:
    """Return the squared distance of the margin from 1 / (2 beta): arXiv 2310.12036, equation 17, `beta` for tau.

    Takes log ratios to the reference per token. The paper defines them for whole completions; TRL divides by the number
    of tokens, because the paper's authors confirmed that their results do (comment in TRL's DPOTrainer). So do we.
    """
    margin = _full_precision(chosen_mean_log_ratios_P) - _full_precision(rejected_mean_log_ratios_P)
    return (margin - 1 / (2 * beta)) ** 2


def simpo_losses(chosen_means_P: Tensor, rejected_means_P: Tensor, beta: float, gamma: float) -> Tensor:
    """Return -log sigmoid of the difference of rewards minus the margin `gamma`: arXiv 2405.14734, equation 6.

    Takes mean log-probabilities per token.
    """
    return -logsigmoid(beta * (_full_precision(chosen_means_P) - _full_precision(rejected_means_P)) - gamma)


def cpo_losses(chosen_sums_P: Tensor, rejected_sums_P: Tensor, beta: float) -> Tensor:
    """Return -log sigmoid of the difference of rewards without a reference: arXiv 2401.08417, equation 3.

    Takes log-probabilities summed over tokens.
    """
    return -logsigmoid(beta * (_full_precision(chosen_sums_P) - _full_precision(rejected_sums_P)))


class OrpoObjective:
    """ORPO: the likelihood of the chosen completion plus `beta` times the odds-ratio loss (arXiv 2403.07691, eq. 6)."""

    uses_rejected = True
    uses_reference = False
    nll_weight = 1.0

    def __init__(self, config: Orpo) -> None:
        self.nll_on = config.nll_on
        self._beta = config.beta

    def pair_losses(self, chosen: CompletionLogps, rejected: CompletionLogps) -> Tensor:
        """Return `beta` times the odds-ratio losses of mean log-probabilities."""
        return self._beta * odds_ratio_losses(chosen.means, rejected.means)

    def rewards(self, completions: CompletionLogps) -> Tensor:
        """Return `beta` times the mean log-probability."""
        return self._beta * _full_precision(completions.means)


class SftObjective:
    """SFT: the likelihood of the chosen completion alone."""

    uses_rejected = False
    uses_reference = False
    nll_weight = 1.0

    def __init__(self, config: Sft) -> None:
        self.nll_on = config.nll_on

    def pair_losses(self, chosen: CompletionLogps, rejected: CompletionLogps) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(_full_precision(chosen.sums))

    def rewards(self, completions: CompletionLogps) -> Tensor:
        """Return the mean log-probability. TRL's SFTTrainer has no rewards; these rank completions as ORPO's do."""
        return _full_precision(completions.means)


class DpoObjective:
    """DPO: log-probabilities of whole completions relative to the reference."""

    uses_rejected = True
    uses_reference = True
    nll_weight = 0.0
    nll_on: NllOn = "completion"

    def __init__(self, config: Dpo) -> None:
        self._beta = config.beta

    def pair_losses(self, chosen: CompletionLogps, rejected: CompletionLogps) -> Tensor:
        """Return `dpo_losses`. Raises ValueError without a reference."""
        return dpo_losses(_log_ratios(chosen), _log_ratios(rejected), self._beta)

    def rewards(self, completions: CompletionLogps) -> Tensor:
        """Return `beta` times the log ratio to the reference. Raises ValueError without a reference."""
        return self._beta * _log_ratios(completions)


class IpoObjective:
    """IPO: log-probabilities per token relative to the reference, with a target margin."""

    uses_rejected = True
    uses_reference = True
    nll_weight = 0.0
    nll_on: NllOn = "completion"

    def __init__(self, config: Ipo) -> None:
        self._beta = config.beta

    def pair_losses(self, chosen: CompletionLogps, rejected: CompletionLogps) -> Tensor:
        """Return `ipo_losses`. Raises ValueError without a reference."""
        return ipo_losses(_log_ratios(chosen) / chosen.counts, _log_ratios(rejected) / rejected.counts, self._beta)

    def rewards(self, completions: CompletionLogps) -> Tensor:
        """Return `beta` times the log ratio of the whole completion, which TRL logs although its loss uses means.

        Raises ValueError without a reference.
        """
        return self._beta * _log_ratios(completions)


class SimPoObjective:
    """SimPO: log-probabilities per token with a target margin between chosen and rejected."""

    uses_rejected = True
    uses_reference = False
    nll_weight = 0.0
    nll_on: NllOn = "completion"

    def __init__(self, config: SimPo) -> None:
        self._beta, self._gamma = config.beta, config.simpo_gamma

    def pair_losses(self, chosen: CompletionLogps, rejected: CompletionLogps) -> Tensor:
        """Return `simpo_losses`."""
        return simpo_losses(chosen.means, rejected.means, self._beta, self._gamma)

    def rewards(self, completions: CompletionLogps) -> Tensor:
        """Return `beta` times the mean log-probability."""
        return self._beta * _full_precision(completions.means)


class CpoObjective:
    """CPO: log-probabilities of whole completions, plus the likelihood of the chosen one.

    The paper sums the likelihood over a completion's tokens; TRL takes the mean, and so do we.
    """

    uses_rejected = True
    uses_reference = False

    def __init__(self, config: Cpo) -> None:
        self.nll_weight = config.cpo_alpha
        self.nll_on = config.nll_on
        self._beta = config.beta

    def pair_losses(self, chosen: CompletionLogps, rejected: CompletionLogps) -> Tensor:
        """Return `cpo_losses`."""
        return cpo_losses(chosen.sums, rejected.sums, self._beta)

    def rewards(self, completions: CompletionLogps) -> Tensor:
        """Return `beta` times the log-probability."""
        return self._beta * _full_precision(completions.sums)


def build(config: AnyObjective) -> Objective:
    """Build the objective of a config."""
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


def _log_ratios(completions: CompletionLogps) -> Tensor:
    """Return the log-probability of each completion minus that under the reference."""
    if completions.reference_sums is None:
        raise ValueError("the objective needs log-probabilities of a reference, got none")
    return _full_precision(completions.sums) - _full_precision(completions.reference_sums)


def _full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
