"""The conformance suite of objectives: what the trainers rely on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mint_ray.objectives import CompletionLogps, Objective

SUMS = (-0.5, -40.0, -1e4, 0.0)
COUNTS = (1, 9, 50, 2)


def check_objective(objective: Objective) -> None:
    """Assert that an objective follows the `Objective` protocol."""
    assert objective.nll_weight >= 0
    assert objective.nll_on in ("full", "completion")
    _check_shapes_and_precision(objective)
    _check_gradients(objective)
    if objective.uses_reference:
        with pytest.raises(ValueError, match="reference"):
            objective.pair_losses(*make_pairs(torch.float32, reference=False))


def make_pairs(dtype: torch.dtype, *, reference: bool = True) -> tuple[CompletionLogps, CompletionLogps]:
    """Return chosen and rejected completions, certain and very unlikely ones among them, as leaves with gradients."""
    chosen, rejected = (
        CompletionLogps(
            sums=torch.tensor(sums, dtype=dtype, requires_grad=True),
            counts=torch.tensor(COUNTS),
            reference_sums=torch.tensor(SUMS, dtype=dtype) if reference else None,
        )
        for sums in (SUMS, SUMS[::-1])
    )
    return chosen, rejected


def _check_shapes_and_precision(objective: Objective) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        chosen, rejected = make_pairs(dtype)
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        for result in (objective.pair_losses(chosen, rejected), objective.rewards(chosen)):
            assert result.shape == (len(SUMS),)
            assert result.dtype == expected
            assert torch.isfinite(result).all()


def _check_gradients(objective: Objective) -> None:
    chosen, rejected = make_pairs(torch.float32)
    losses_P = objective.pair_losses(chosen, rejected)
    if losses_P.requires_grad:
        losses_P.sum().backward()  # type: ignore[no-untyped-call]
    for completions in (chosen, rejected):
        assert torch.isfinite(_gradient(completions)).all()
    if not objective.uses_rejected:
        # training does not even run them
        assert not _gradient(rejected).any()
    # a pair's loss does not depend on the other pairs
    first = [
        CompletionLogps(sums=completions.sums[:1], counts=completions.counts[:1], reference_sums=torch.tensor(SUMS[:1]))
        for completions in (chosen, rejected)
    ]
    torch.testing.assert_close(objective.pair_losses(*first), losses_P[:1])


def _gradient(completions: CompletionLogps) -> Tensor:
    return torch.zeros_like(completions.sums) if completions.sums.grad is None else completions.sums.grad
