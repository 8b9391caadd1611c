import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from mint_ray.objectives import CompletionLogps, build_objective
from mint_ray.objectives.config import Cpo, Dpo, Ipo, Orpo, Sft, SimPo
from mint_ray.objectives.losses import log1mexp, log_odds_ratio, odds_ratio_losses
from tests.tiny import tiny_model, tiny_tokenizer

PAIRS = 5
PREFERENCES = [Orpo(beta=0.3), Dpo(beta=0.2), Ipo(beta=0.4), SimPo(beta=2.5, simpo_gamma=0.8), Cpo(beta=0.2)]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def make_trainer(folder, trainer_class, config_class, **options):
    """Return a trainer of TRL with the tiny model."""
    args = config_class(
        output_dir=str(folder), max_length=64, report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False, **options,
    )  # fmt: skip
    text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    model = tiny_model()
    others = {"ref_model": tiny_model()} if trainer_class is DPOTrainer else {}
    return trainer_class(model=model, args=args, train_dataset=text, processing_class=tiny_tokenizer(), **others)


def draw_tokens(dtype):
    """Return log-probabilities of tokens, padded with zeros to 2 x PAIRS rows, chosen rows first, and their mask.

    The completions are short and long, likely and unlikely, and one has a single token.
    """
    generator = torch.Generator().manual_seed(1)
    counts = torch.tensor([1, 3, 7, 4, 2, 6, 2, 5, 3, 4])
    mask = torch.arange(8) < counts[:, None]
    scale = torch.logspace(-2, 0.7, 2 * PAIRS, dtype=dtype)[torch.randperm(2 * PAIRS, generator=generator)]
    logps = -torch.rand((2 * PAIRS, 8), generator=generator, dtype=dtype) * scale[:, None] * mask
    return logps.requires_grad_(), mask


def to_completions(logps, mask, reference=None):
    sums, counts = (logps * mask).sum(1), mask.sum(1)
    sides = [slice(0, PAIRS), slice(PAIRS, None)]
    return [
        CompletionLogps(
            sums=sums[side], counts=counts[side], reference_sums=None if reference is None else reference[side]
        )
        for side in sides
    ]


def gradient(loss, leaf):
    return torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0]


def test_orpo_equals_trl(tmp_path):
    trl = make_trainer(tmp_path, ORPOTrainer, ORPOConfig, beta=0.3)
    logps, mask = draw_tokens(torch.float32)  # TRL always computes in float32
    chosen, rejected = to_completions(logps, mask)
    expected, *rewards, ratio, _ = trl.odds_ratio_loss(chosen.means, rejected.means)
    objective = build_objective(Orpo(beta=0.3))
    losses = objective.pair_losses(chosen, rejected)
    # TRL returns beta x log sigmoid, and subtracts it from the likelihood term
    torch.testing.assert_close(losses, -expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient(losses, logps), -gradient(expected, logps), rtol=1e-6, atol=1e-7)
    for side, reward in zip((chosen, rejected), rewards, strict=True):
        torch.testing.assert_close(objective.rewards(side).detach(), reward)
    assert -odds_ratio_losses(chosen.means, rejected.means).mean().item() == pytest.approx(ratio.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (Cpo(beta=0.2), {"beta": 0.2}),
        (SimPo(beta=2.5, simpo_gamma=0.8), {"beta": 2.5, "loss_type": "simpo", "simpo_gamma": 0.8, "cpo_alpha": 0.0}),
    ],
    ids=["cpo", "simpo"],
)
def test_cpo_and_simpo_equal_trl(tmp_path, config, options):
    trl = make_trainer(tmp_path, CPOTrainer, CPOConfig, **options)
    logps, mask = draw_tokens(torch.float64)
    # through TRL's own log-probabilities, where it takes sums or means
    sides = trl_logps(trl, logps, mask).chunk(2)
    expected, *rewards = trl.cpo_loss(*sides)
    objective = build_objective(config)
    chosen, rejected = to_completions(logps, mask)
    losses = objective.pair_losses(chosen, rejected)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(losses, logps), gradient(expected, logps), rtol=1e-12, atol=1e-12)
    for side, reward in zip((chosen, rejected), rewards, strict=True):
        torch.testing.assert_close(objective.rewards(side).detach(), reward, rtol=1e-12, atol=1e-12)


def trl_logps(trl, logps, mask):
    """Return the log-probabilities that CPOTrainer computes from logits of 3 tokens, where token 1 has `logps`."""
    rest = torch.log(-torch.expm1(torch.where(mask, logps, -1.0)) / 2)
    logits = torch.stack([rest, torch.where(mask, logps, 0.0), rest], dim=-1)
    # one more column on each side: a prompt token, and the logits after the last token
    logits = torch.cat([logits, logits[:, -1:]], dim=1)
    labels = torch.cat([torch.full((len(mask), 1), -100), torch.where(mask, 1, -100)], dim=1)
    return trl.get_batch_logps(logits, labels, average_log_prob=trl.loss_type == "simpo")


@pytest.mark.parametrize(
    ("config", "loss_type"), [(Dpo(beta=0.2), "sigmoid"), (Ipo(beta=0.4), "ipo")], ids=["dpo", "ipo"]
)
def test_dpo_and_ipo_equal_trl(tmp_path, config, loss_type):
    trl = make_trainer(tmp_path, DPOTrainer, DPOConfig, beta=config.beta, loss_type=loss_type)
    trl.precompute_ref_logps = True
    logps, mask = draw_tokens(torch.float64)
    reference = logps.sum(1).detach() - torch.linspace(-3, 5, 2 * PAIRS, dtype=torch.float64)
    outputs = SimpleNamespace(log_probs=logps * mask, entropy=logps * 0, mean_logits=logps * 0, is_top1=mask)
    completion_mask = torch.cat([torch.zeros((2 * PAIRS, 1), dtype=torch.bool), mask], dim=1).long()
    inputs = {
        "input_ids": torch.ones_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "ref_chosen_logps": reference[:PAIRS],
        "ref_rejected_logps": reference[PAIRS:],
    }
    # TRL computes the loss inside the forward pass, so the model returns these numbers
    expected = trl.compute_loss(lambda **_: outputs, inputs)
    objective = build_objective(config)
    chosen, rejected = to_completions(logps, mask, reference)
    losses = objective.pair_losses(chosen, rejected)
    torch.testing.assert_close(losses.mean(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(losses.mean(), logps), gradient(expected, logps), rtol=1e-12, atol=1e-12)
    logged = trl._metrics["train"]
    chosen_rewards, rejected_rewards = objective.rewards(chosen), objective.rewards(rejected)
    assert logged["rewards/chosen"] == pytest.approx([chosen_rewards.mean().item()])
    assert logged["rewards/rejected"] == pytest.approx([rejected_rewards.mean().item()])
    assert logged["rewards/accuracies"] == pytest.approx([(chosen_rewards > rejected_rewards).double().mean().item()])


def test_sft_is_cross_entropy_alone():
    objective = build_objective(Sft())
    logps, mask = draw_tokens(torch.float64)
    chosen, rejected = to_completions(logps, mask)
    nll = -chosen.sums.sum() / chosen.counts.sum()
    loss = objective.nll_weight * nll + objective.pair_losses(chosen, rejected).mean()
    # two tokens; the first has the given log-probability
    logits = torch.stack([logps[:PAIRS], torch.log(-torch.expm1(torch.where(mask[:PAIRS], logps[:PAIRS], -1.0)))], -1)
    expected = cross_entropy(logits[mask[:PAIRS]], torch.zeros(int(mask[:PAIRS].sum()), dtype=torch.long))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert not objective.uses_rejected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # odds 4 and 1: the ratio is 4, and -log sigmoid(log 4) = log(5/4)
        (Orpo(beta=0.5), 0.5 * math.log(5 / 4)),
        (Sft(), 0.0),
        # log ratios log 2 and log 1: -log sigmoid(log 2 / 2) = log(1 + 2^-0.5)
        (Dpo(beta=0.5), math.log(1 + 2**-0.5)),
        # per token: log 2 / 2 - 0, with target 1
        (Ipo(beta=0.5), (math.log(2) / 2 - 1) ** 2),
        # means log 0.8 and log 0.5: 2 log 1.6 minus log 2 is log 1.28
        (SimPo(beta=2.0, simpo_gamma=math.log(2)), math.log(1 + 1 / 1.28)),
        # sums log 0.64 and log 0.5: log 1.28
        (Cpo(beta=1.0), math.log(1 + 1 / 1.28)),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_the_loss_of_a_pair_equals_a_hand_computation(config, expected):
    # two tokens of probability 0.8 (0.32 together under the reference), and one token of 0.5
    chosen = to_side([math.log(0.64)], [2], [math.log(0.32)])
    rejected = to_side([math.log(0.5)], [1], [math.log(0.5)])
    loss = build_objective(config).pair_losses(chosen, rejected)
    assert loss.tolist() == pytest.approx([expected], rel=1e-12)


def to_side(sums, counts, reference=None):
    return CompletionLogps(
        sums=torch.tensor(sums, dtype=torch.float64),
        counts=torch.tensor(counts),
        reference_sums=None if reference is None else torch.tensor(reference, dtype=torch.float64),
    )


def test_log1mexp_equals_float64_arithmetic_on_both_branches():
    x = torch.tensor([-1e-5, -1e-3, -0.1, -0.69, -0.7, -1.0, -10.0, -18.0])
    expected = torch.log(-torch.expm1(x.double()))
    torch.testing.assert_close(log1mexp(x).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("config", [*PREFERENCES, Sft()], ids=lambda config: config.kind)
def test_bfloat16_inputs_are_computed_in_float32_and_float64_ones_in_float64(config):
    objective = build_objective(config)
    for dtype, expected in [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        numbers = torch.tensor([-1.0, -2.0], dtype=dtype)
        side = CompletionLogps(sums=numbers, counts=torch.tensor([1, 2]), reference_sums=numbers)
        assert objective.pair_losses(side, side).dtype == expected
        assert objective.rewards(side).dtype == expected


def test_a_log_odds_ratio_in_bfloat16_keeps_the_precision_of_float32():
    chosen, rejected = torch.tensor([-0.001953125]), torch.tensor([-1.0])  # both are bfloat16 numbers
    expected = log_odds_ratio(chosen.double(), rejected.double())
    actual = log_odds_ratio(chosen.bfloat16(), rejected.bfloat16())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)


LOGPS = st.one_of(st.floats(-1e4, 0.0, width=32), st.floats(-(2.0**-17), 0.0, width=32), st.just(0.0), st.just(-1e4))


@pytest.mark.parametrize("config", PREFERENCES, ids=lambda config: config.kind)
@settings(max_examples=200, deadline=None)
@given(numbers=st.tuples(LOGPS, LOGPS, LOGPS, LOGPS), counts=st.tuples(st.integers(1, 50), st.integers(1, 50)))
def test_losses_and_gradients_are_finite_for_all_log_probabilities(config, numbers, counts):
    leaf = torch.tensor(numbers[:2], requires_grad=True)
    chosen, rejected = (
        CompletionLogps(
            sums=leaf[index : index + 1] * 1.0,
            counts=torch.tensor([counts[index]]),
            reference_sums=torch.tensor([numbers[2 + index]]),
        )
        for index in (0, 1)
    )
    loss = build_objective(config).pair_losses(chosen, rejected)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient(loss, leaf)).all()


@pytest.mark.parametrize("config", PREFERENCES, ids=lambda config: config.kind)
@settings(max_examples=200, deadline=None)
@given(
    chosen=st.floats(-30.0, -1e-3),
    rise=st.floats(0.01, 1.0),
    rejected=st.floats(-30.0, 0.0),
    counts=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_the_loss_decreases_as_the_chosen_completion_becomes_more_likely(config, chosen, rise, rejected, counts):
    higher = chosen * (1 - rise)
    if isinstance(config, Ipo):
        # beyond the target margin it increases again
        assume((higher + 1.0) / counts[0] - (rejected + 2.0) / counts[1] < 1 / (2 * config.beta))
    objective = build_objective(config)
    other = to_side([rejected], [counts[1]], [-2.0])
    before = objective.pair_losses(to_side([chosen], [counts[0]], [-1.0]), other)
    after = objective.pair_losses(to_side([higher], [counts[0]], [-1.0]), other)
    assert after.item() < before.item()


@pytest.mark.parametrize("config", [Dpo(), Ipo()], ids=lambda config: config.kind)
def test_a_missing_reference_is_an_error(config):
    objective = build_objective(config)
    assert objective.uses_reference
    with pytest.raises(ValueError, match="reference"):
        objective.pair_losses(to_side([-1.0], [1]), to_side([-2.0], [1]))
