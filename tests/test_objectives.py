import math

import pytest
import torch

from mint_ray.objectives import log1mexp, log_odds_ratio, odds_ratio_losses, orpo_loss


def test_log1mexp_equals_float64_arithmetic_on_both_sides_of_its_branch():
    x = torch.tensor([-1e-5, -1e-3, -0.1, -0.69, -0.7, -1.0, -10.0, -18.0])
    expected = torch.log(-torch.expm1(x.double()))
    torch.testing.assert_close(log1mexp(x).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("certain", [0.0, -1e-9, 1e-6])
def test_a_certain_completion_has_a_finite_loss_and_gradient(certain):
    chosen = torch.tensor([certain], requires_grad=True)
    rejected = torch.tensor([-2.0], requires_grad=True)
    loss = odds_ratio_losses(chosen, rejected).sum() + odds_ratio_losses(rejected, chosen).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(chosen.grad).all()
    assert torch.isfinite(rejected.grad).all()


def test_log_odds_ratio_equals_the_quotient_of_odds():
    chosen, rejected = 0.8, 0.3
    expected = math.log((chosen / (1 - chosen)) / (rejected / (1 - rejected)))
    actual = log_odds_ratio(torch.tensor([math.log(chosen)]), torch.tensor([math.log(rejected)]))
    assert actual.item() == pytest.approx(expected, rel=1e-6)


def test_bfloat16_log_probabilities_are_worked_out_in_float32():
    chosen = torch.tensor([-0.001953125], dtype=torch.bfloat16)
    assert log_odds_ratio(chosen, chosen - 1).dtype == torch.float32


def test_orpo_loss_equals_a_hand_computation():
    # odds 4 and 1: odds ratio 4, so -log sigmoid(log 4) = log(5/4)
    losses = odds_ratio_losses(torch.tensor([math.log(0.8)]), torch.tensor([math.log(0.5)]))
    loss = orpo_loss(torch.tensor(6.0), torch.tensor(3), losses, torch.tensor(1), beta=0.5)
    assert loss.item() == pytest.approx(2.0 + 0.5 * math.log(5 / 4), rel=1e-6)


def test_shares_of_a_step_add_up_to_its_loss():
    chosen, rejected = torch.tensor([-0.2, -0.9, -1.5]), torch.tensor([-1.0, -0.8, -2.5])
    losses, tokens, pairs = odds_ratio_losses(chosen, rejected), torch.tensor(10), torch.tensor(3)
    whole = orpo_loss(torch.tensor(7.0), tokens, losses, pairs, beta=0.3)
    shares = [
        orpo_loss(torch.tensor(3.0), tokens, losses[:1], pairs, beta=0.3),
        orpo_loss(torch.tensor(4.0), tokens, losses[1:], pairs, beta=0.3),
        orpo_loss(torch.tensor(0.0), tokens, losses[:0], pairs, beta=0.3),
    ]
    assert sum(shares).item() == pytest.approx(whole.item(), rel=1e-6)
