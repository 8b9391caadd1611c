"""Every objective passes the conformance suite; so does a new one that follows the steps of the README."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn.functional import relu

from mint_ray.objectives import CompletionLogps, build_objective
from mint_ray.objectives.config import AnyObjective, Cpo, Dpo, Ipo, NllOn, Orpo, Sft, SimPo
from tests.objectives.conformance import check_objective


@pytest.mark.parametrize("config", [Orpo(), Sft(), Dpo(), Ipo(), SimPo(), Cpo()], ids=lambda config: config.kind)
def test_every_objective_conforms(config: AnyObjective) -> None:
    check_objective(build_objective(config))


@dataclasses.dataclass(frozen=True)
class HingeObjective:
    """A new member: the hinge loss of SLiC (arXiv 2305.10425) on mean log-probabilities."""

    delta: float = 1.0
    uses_rejected: bool = True
    uses_reference: bool = False
    nll_weight: float = 1.0
    nll_on: NllOn = "completion"

    def pair_losses(self, chosen: CompletionLogps, rejected: CompletionLogps) -> Tensor:
        return relu(self.delta - self.rewards(chosen) + self.rewards(rejected))

    def rewards(self, completions: CompletionLogps) -> Tensor:
        means_P = completions.means
        return means_P if means_P.dtype == torch.float64 else means_P.float()


def test_a_new_objective_conforms() -> None:
    check_objective(HingeObjective())


class HalfPrecision(HingeObjective):
    """An objective that keeps the precision of its inputs."""

    def rewards(self, completions: CompletionLogps) -> Tensor:
        return completions.means


def test_an_objective_in_half_precision_does_not_conform() -> None:
    with pytest.raises(AssertionError):
        check_objective(HalfPrecision())
