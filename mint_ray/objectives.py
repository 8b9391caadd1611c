"""What a student is trained for: ORPO as pure float32 functions of log-probabilities (arXiv 2403.07691)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

NEAREST_TO_CERTAIN = -1e-6
"""Log-probabilities above this are taken as this: log(1 - e^x) and its slope 1/x run off to infinity at 0."""


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, any shape, in float32; stable on both sides of -ln 2.

    Values above `NEAREST_TO_CERTAIN` are clamped to it, with zero gradient.
    """
    x = x.float().clamp(max=NEAREST_TO_CERTAIN)
    return torch.where(x < -math.log(2), torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))


def log_odds_ratio(chosen_logps_P: Tensor, rejected_logps_P: Tensor) -> Tensor:
    """Log of the odds of `chosen` over those of `rejected`, odds being P / (1 - P) (equations 4 and 5).

    Both are mean log-probabilities per token (equation 3), one per pair, shape (P,).
    """
    chosen, rejected = chosen_logps_P.float(), rejected_logps_P.float()
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


def odds_ratio_losses(chosen_logps_P: Tensor, rejected_logps_P: Tensor) -> Tensor:
    """-log sigmoid of the log odds ratio (equation 7), one per pair, shape (P,)."""
    return -logsigmoid(log_odds_ratio(chosen_logps_P, rejected_logps_P))


def orpo_loss(nll_sum: Tensor, nll_tokens: Tensor, losses_P: Tensor, pairs: Tensor, beta: float) -> Tensor:
    """NLL per token plus `beta` times the odds-ratio loss per pair (equation 6, with `beta` for lambda).

    The normalisers are given rather than counted, so that the shares of one optimiser step that several micro-batches
    and ranks work out add up to the loss of the whole: `nll_tokens` and `pairs` count the whole step, `nll_sum`
    (scalar) and `losses_P` belong to the share. A step without pairs costs 0.
    """
    return nll_sum / nll_tokens.clamp(min=1) + beta * losses_P.sum() / pairs.clamp(min=1)
