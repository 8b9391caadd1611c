import copy
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from mint_ray.config.loader import UserError
from mint_ray.layouts import Example
from mint_ray.layouts.concatenated import ConcatenatedLayout
from mint_ray.objectives import CompletionLogps, build_objective
from mint_ray.objectives.config import Cpo, Dpo, Ipo, Orpo, Sft, SimPo
from mint_ray.trainers import TrainingRun, build_trainer
from mint_ray.trainers.config import TrainerArguments, TrainResources
from mint_ray.trainers.examples import InMemoryExamples
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers import workers

OBJECTIVES = {
    "orpo": Orpo(beta=0.3, nll_on="full"),
    "sft": Sft(),
    "sft_full": Sft(nll_on="full"),
    "dpo": Dpo(beta=0.2),
    "ipo": Ipo(beta=0.4),
    "simpo": SimPo(beta=2.0, simpo_gamma=0.5),
    "cpo": Cpo(beta=0.2, cpo_alpha=0.7),
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def make_examples(records, pairs_of_record=None, reference=False, seed=0):
    """Return records of random tokens with different lengths and, by default, different numbers of pairs."""
    rng = random.Random(seed)

    def tokens(min_length, max_length):
        return [rng.randrange(3, 400) for _ in range(rng.randint(min_length, max_length))]

    examples = []
    for record in range(records):
        pairs = pairs_of_record or 1 + record % 3
        completions = [tokens(1, 6) for _ in range(pairs + 1)]
        examples.append(
            Example(
                record_id=f"r{record}",
                prompt_ids=tokens(2, 12),
                completions=completions,
                pairs=[(0, index + 1) for index in range(pairs)],
                reference_logps=[rng.uniform(-40, -5) for _ in completions] if reference else None,
            )
        )
    return examples


def make_adapter(model):
    """Return the model with an adapter that is not at its initial values."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(3)
    model = get_peft_model(model, lora)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


def train(
    folder, objective, train, validation=(), *, model, kind="trl", per_device=4, callbacks=(), resume=None, **more
):
    options = {"train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-3, "warmup_ratio": 0.0} | more
    run = TrainingRun(
        model=model,
        tokenizer=tiny_tokenizer(),
        train=InMemoryExamples(train),
        validation=InMemoryExamples(list(validation)),
        output_dir=folder,
        resources=TrainResources(per_device_train_batch_size=per_device, per_device_eval_batch_size=4),
        run_name="test",
        callbacks=callbacks,
        resume_from_checkpoint=resume,
    )
    return build_trainer(TrainerArguments(kind=kind, objective=objective, **options)).train(run)


def trained(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


class Recorder(TrainerCallback):
    """The input rows of the model in training, and the gradients of every step."""

    def __init__(self, model):
        self.rows, self.gradients = [], []
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        # on the model below the LM head, which TRL may call directly
        base.model.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module, args, kwargs):
        if torch.is_grad_enabled():
            ids = args[0] if args else kwargs["input_ids"]
            for row, mask in zip(ids.tolist(), kwargs["attention_mask"].tolist(), strict=True):
                self.rows.append([token for token, kept in zip(row, mask, strict=True) if kept])

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradients.append(
            {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}
        )


def our_loss(model, examples, config):
    """Return the loss of all pairs with the plain layout and our objective, and the rewards of both completions."""
    objective, layout = build_objective(config), ConcatenatedLayout()
    batch = layout.collate(examples, score_prompt=objective.nll_weight > 0 and objective.nll_on == "full")
    logps = layout.compute_logps(model, batch)
    reference_C = None
    if objective.uses_reference:
        if examples[0].reference_logps is None:
            with torch.no_grad(), model.disable_adapter():
                reference_C = layout.compute_logps(model, batch).sums
        else:
            reference_C = torch.tensor([number for example in examples for number in example.reference_logps])
    chosen, rejected = (
        CompletionLogps(
            sums=logps.sums[index_P],
            counts=logps.counts[index_P],
            reference_sums=None if reference_C is None else reference_C[index_P],
        )
        for index_P in (batch["chosen_P"], batch["rejected_P"])
    )
    nll = -(chosen.sums.sum() + logps.prompt_sums[batch["record_P"]].sum()) / batch["nll_tokens"]
    loss = objective.nll_weight * nll + objective.pair_losses(chosen, rejected).mean()
    return loss, objective.rewards(chosen), objective.rewards(rejected)


@pytest.mark.parametrize("weights", ["adapter", "full"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_has_the_loss_gradient_and_tokens_of_our_objective(tmp_path, name, weights):
    config = OBJECTIVES[name]
    examples = make_examples(4, reference=weights == "full")
    rows = [(example, *pair) for example in examples for pair in example.pairs]
    model = make_adapter(tiny_model()) if weights == "adapter" else tiny_model()
    expected, chosen, rejected = our_loss(ours := copy.deepcopy(model), examples, config)
    expected.backward()
    recorder = Recorder(model)
    result = train(
        tmp_path, config, examples, model=model, callbacks=[recorder], train_batch_size=len(rows), per_device=len(rows),
        max_steps=1, max_grad_norm=0.0,
    )  # fmt: skip
    logged = result.log_history[0]
    assert logged["loss"] == pytest.approx(expected.item(), abs=1e-5)
    if name.startswith("sft"):
        assert not any(key.startswith("rewards") for key in logged)
    else:
        assert logged["rewards/chosen"] == pytest.approx(chosen.mean().item(), abs=1e-5)
        assert logged["rewards/rejected"] == pytest.approx(rejected.mean().item(), abs=1e-5)
        assert logged["rewards/accuracies"] == pytest.approx((chosen > rejected).float().mean().item())
    [gradients] = recorder.gradients
    reference = {key: weight.grad for key, weight in ours.named_parameters() if weight.requires_grad}
    assert gradients.keys() == reference.keys()
    norm = torch.sqrt(sum((gradient**2).sum() for gradient in reference.values()))
    for key, gradient in reference.items():
        assert (gradients[key] - gradient).abs().max() / norm < 1e-5, key
    sides = (1,) if name.startswith("sft") else (1, 2)
    ids = [row[0].prompt_ids + row[0].completions[row[side]] for row in rows for side in sides]
    assert sorted(recorder.rows) == sorted(ids)
    assert result.train_tokens == sum(map(len, ids))


def test_trl_and_the_shared_prefix_trainer_end_with_the_same_weights(tmp_path):
    # with one pair per record and one micro-batch per step both normalize by the same batch
    examples = make_examples(14, pairs_of_record=1)
    outcomes = {}
    for kind in ("trl", "shared_prefix"):
        model = make_adapter(tiny_model())
        result = train(
            tmp_path / kind, OBJECTIVES["orpo"], examples[:10], examples[10:], model=model, kind=kind,
            num_train_epochs=2, eval_steps=3,
        )  # fmt: skip
        outcomes[kind] = result, trained(model)
    (theirs, their_weights), (ours, our_weights) = outcomes["trl"], outcomes["shared_prefix"]
    assert theirs.global_step == ours.global_step == 6
    assert theirs.best_step == ours.best_step
    assert theirs.best_metric == pytest.approx(ours.best_metric, rel=1e-4)
    for key in ("loss", "nll_loss", "log_odds_ratio", "rewards/margins", "eval_loss"):
        values = [row[key] for row in ours.log_history if key in row]
        assert [row[key] for row in theirs.log_history if key in row] == pytest.approx(values, rel=1e-4, abs=1e-5), key
    for name, weight in our_weights.items():
        torch.testing.assert_close(their_weights[name], weight, rtol=1e-3, atol=1e-5)


def test_the_gradient_of_a_step_is_the_mean_over_its_micro_batches(tmp_path):
    examples = make_examples(4, pairs_of_record=2)
    gradients = []
    for per_device in (8, 2):
        model = tiny_model()
        recorder = Recorder(model)
        train(
            tmp_path / str(per_device), OBJECTIVES["simpo"], examples, model=model, callbacks=[recorder], max_steps=1,
            train_batch_size=8, per_device=per_device, max_grad_norm=0.0,
        )  # fmt: skip
        gradients += recorder.gradients
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path):
    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **_):
            control.should_training_stop = True

    examples = make_examples(8)
    options = {"num_train_epochs": 2, "eval_steps": 3, "per_device": 2}
    uninterrupted = make_adapter(tiny_model())
    expected = train(
        tmp_path / "uninterrupted", OBJECTIVES["dpo"], examples, examples[:2], model=uninterrupted, **options
    )
    train(
        tmp_path / "broken", OBJECTIVES["dpo"], examples, examples[:2], model=make_adapter(tiny_model()),
        callbacks=[Stop()], **options,
    )  # fmt: skip
    resumed = make_adapter(tiny_model())
    result = train(
        tmp_path / "again", OBJECTIVES["dpo"], examples, examples[:2], model=resumed,
        resume=tmp_path / "broken" / "checkpoint-3", **options,
    )  # fmt: skip
    assert result.global_step == expected.global_step == 8
    assert result.train_tokens == expected.train_tokens
    for name, weight in trained(uninterrupted).items():
        torch.testing.assert_close(trained(resumed)[name], weight, rtol=1e-6, atol=1e-7)
    # TRL's copy of the adapter is removed
    assert list(resumed.peft_config) == ["default"]


def test_no_telemetry_is_sent(tmp_path, monkeypatch):
    sent = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **data: sent.append(data))
    train(tmp_path, OBJECTIVES["sft"], make_examples(2), model=tiny_model(), max_steps=1)
    assert not sent


def test_two_workers_end_with_the_weights_of_one(tmp_path):
    # three complete steps of the 15 pairs: TRL fills the last one with pairs of the first
    config = TrainerArguments(
        kind="trl", objective=OBJECTIVES["dpo"], train_batch_size=4, max_steps=3, eval_steps=3, learning_rate=1e-3,
        logging_steps=1, warmup_ratio=0.0,
    )  # fmt: skip
    one, expected = workers.train(
        tmp_path / "one", config, TrainResources(per_device_train_batch_size=4, per_device_eval_batch_size=1),
        model=workers.tiny_adapter(), records=8, validation=2,
    )  # fmt: skip
    logs = workers.train_on_workers(
        2, tmp_path / "two", config, TrainResources(per_device_train_batch_size=2, per_device_eval_batch_size=1),
        adapter=True, records=8, validation=2,
    )  # fmt: skip
    actual = torch.load(tmp_path / "two" / "weights.pt")
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, rtol=1e-3, atol=1e-5)
    for log in logs:
        for key in ("loss", "grad_norm", "eval_loss"):
            values = [row[key] for row in one.log_history if key in row]
            assert [row[key] for row in log if key in row] == pytest.approx(values, rel=1e-4), key


@pytest.mark.parametrize("objective", [Orpo(nll_on="completion"), Cpo(nll_on="full")], ids=lambda one: one.kind)
def test_a_likelihood_that_trl_does_not_support_raises_an_error(objective):
    with pytest.raises(UserError, match=f"objective.nll_on: got {objective.nll_on}; TRL's .* only"):
        build_trainer(TrainerArguments(kind="trl", objective=objective))


def test_a_batch_size_that_is_not_divisible_raises_an_error(tmp_path):
    with pytest.raises(
        UserError, match="train_batch_size: got 4, not a multiple of per_device_train_batch_size 3 times 1"
    ):
        train(tmp_path, OBJECTIVES["simpo"], make_examples(2), model=tiny_model(), per_device=3)


def test_a_student_without_an_adapter_needs_reference_log_probabilities(tmp_path):
    with pytest.raises(UserError, match="dpo needs reference log-probabilities"):
        train(tmp_path, OBJECTIVES["dpo"], make_examples(2), model=tiny_model())


def test_no_pairs_to_train_on_raise_an_error(tmp_path):
    with pytest.raises(UserError, match="no pairs"):
        train(tmp_path, OBJECTIVES["simpo"], [], model=tiny_model())
