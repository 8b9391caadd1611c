import dataclasses

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from mint_ray.config.loader import UserError
from mint_ray.layouts import chosen_only
from mint_ray.objectives.config import Dpo, Orpo, Sft
from mint_ray.trainers.config import TrainerArguments, TrainResources
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers.workers import make_examples, tiny_adapter, to_pair, train, train_on_workers

TRL_METRICS = {
    *("nll_loss", "log_odds_ratio", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected"),
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class KeepGradients(TrainerCallback):
    """The gradients of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: weight.grad.clone() for name, weight in model.named_parameters()})


@pytest.mark.parametrize("nll_on", ["full", "completion"])
def test_micro_batches_of_1_2_and_8_give_one_gradient(tmp_path, nll_on):
    # 12 records: the second step has only half as many
    config = TrainerArguments(
        objective=Orpo(nll_on=nll_on), train_batch_size=8, max_grad_norm=0.0, learning_rate=1e-3, logging_steps=1
    )
    kept, losses = {}, {}
    # 8 is not divisible by 3; packing puts all records of a micro-batch into few rows
    for name, size, max_tokens_per_row in (
        ("8", 8, None),
        ("3", 3, None),
        ("2", 2, None),
        ("1", 1, None),
        ("8 packed", 8, 400),
    ):
        gradients, resources = KeepGradients(), batches_of(size, max_tokens_per_row=max_tokens_per_row)
        result, _ = train(tmp_path / name, config, resources, records=12, callbacks=[gradients])
        kept[name] = gradients.steps
        losses[name] = [row["loss"] for row in result.log_history if "loss" in row]
    assert len(kept["8"]) == 2
    for name in kept:
        assert losses[name] == pytest.approx(losses["8"], rel=1e-5)
        for step, expected in zip(kept[name], kept["8"], strict=True):
            norm = torch.sqrt(sum((gradient**2).sum() for gradient in expected.values()))
            for weight in expected:
                assert (step[weight] - expected[weight]).abs().max() / norm < 1e-5, (name, weight)


def batches_of(size, **options):
    return TrainResources(per_device_train_batch_size=size, per_device_eval_batch_size=size, **options)


def test_training_lowers_the_loss_and_logs_metrics_under_trl_s_names(tmp_path):
    config = TrainerArguments(
        learning_rate=3e-3, num_train_epochs=5, train_batch_size=4, logging_steps=1, eval_steps=0.25
    )
    result, _ = train(tmp_path, config, batches_of(2), records=12, validation=3)
    losses = [row["loss"] for row in result.log_history if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    rows = [row for row in result.log_history if "nll_loss" in row]
    assert rows[0].keys() >= TRL_METRICS
    beta = config.objective.beta
    assert rows[0]["loss"] == pytest.approx(rows[0]["nll_loss"] - beta * rows[0]["log_odds_ratio"], rel=1e-5)
    assert rows[0]["rewards/chosen"] == pytest.approx(beta * rows[0]["logps/chosen"])
    validations = [row for row in result.log_history if "eval_loss" in row]
    assert len(validations) == 4
    assert validations[0].keys() >= {f"eval_{name}" for name in TRL_METRICS}
    assert result.best_metric == min(row["eval_loss"] for row in validations)
    assert result.best_step in [row["step"] for row in validations]
    assert result.global_step == 15
    assert result.layout == "shared_prefix"
    examples = make_examples(12)
    tokens = sum(len(example.prompt_ids) + sum(map(len, example.completions)) for example in examples)
    assert 0.5 * 5 * tokens < result.train_tokens <= 5 * tokens


def test_training_stops_early_and_ends_with_the_best_weights(tmp_path):
    # with this learning rate the loss only increases
    config = TrainerArguments(
        learning_rate=0.5, num_train_epochs=20, train_batch_size=4, eval_steps=1.0, early_stopping_patience=2,
        lr_scheduler_type="constant", warmup_ratio=0.0,
    )  # fmt: skip
    result, weights = train(tmp_path / "early", config, batches_of(4), records=4, validation=4)
    assert result.global_step < 20
    assert result.global_step == result.best_step + 2
    shorter = dataclasses.replace(config, max_steps=result.best_step)
    _, best = train(tmp_path / "shorter", shorter, batches_of(4), records=4, validation=4)
    for name, weight in best.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=0)


def test_only_the_adapter_of_a_peft_model_is_trained_and_validation_may_be_empty(tmp_path):
    model = tiny_adapter()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    config = TrainerArguments(max_steps=2, learning_rate=1e-2, warmup_ratio=0.0)
    result, _ = train(tmp_path, config, batches_of(8, gradient_checkpointing=True), model=model)
    changed = {name for name, weight in model.named_parameters() if not torch.equal(before[name], weight)}
    assert changed
    assert all("lora_" in name for name in changed)
    assert result.best_metric is None
    assert result.best_step is None


def test_validation_does_not_depend_on_its_batches_and_equals_trl(tmp_path):
    config = TrainerArguments(objective=Orpo(nll_on="full"), max_steps=1, train_batch_size=8, learning_rate=1e-30)
    rows = []
    for size in (8, 2):
        result, _ = train(tmp_path / str(size), config, batches_of(size), validation=5)
        rows.append(next(row for row in result.log_history if "eval_loss" in row))
    for name in ["loss", *TRL_METRICS]:
        assert rows[0][f"eval_{name}"] == pytest.approx(rows[1][f"eval_{name}"], rel=1e-5, abs=1e-6), name
    trl = make_trl_trainer(tmp_path, [to_pair("a", "b", "c", "d")], beta=config.objective.beta)
    loss, metrics = trl.get_batch_loss_metrics(trl.model, trl_batch(make_examples(13)[8:]), train_eval="eval")
    assert rows[0]["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name in TRL_METRICS:
        assert rows[0][f"eval_{name}"] == pytest.approx(metrics[f"eval_{name}"], rel=1e-5, abs=1e-6), name


def trl_batch(examples):
    """Return a batch of TRL's ORPOTrainer, padded on the right."""
    batch = {}
    for example in examples:
        for pair in example.pairs:
            for side, index in zip(("chosen", "rejected"), pair, strict=True):
                completion = example.completions[index]
                ids = example.prompt_ids + completion
                batch.setdefault(f"{side}_input_ids", []).append(ids)
                batch.setdefault(f"{side}_labels", []).append([-100] * len(example.prompt_ids) + completion)
                batch.setdefault(f"{side}_attention_mask", []).append([1] * len(ids))
    padding = {"labels": -100, "mask": 0, "ids": 2}
    return {
        name: torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in values], batch_first=True, padding_value=padding[name.split("_")[-1]]
        )
        for name, values in batch.items()
    }


def test_two_workers_end_with_the_weights_of_one(tmp_path):
    # five records per step: in each step one worker has one record less
    config = TrainerArguments(
        num_train_epochs=1, train_batch_size=5, learning_rate=1e-3, eval_steps=0.5, logging_steps=1
    )
    result, expected = train(tmp_path / "one", config, batches_of(2), records=11, validation=3)
    logs = train_on_workers(2, tmp_path / "two", config, batches_of(2), records=11, validation=3)
    actual = torch.load(tmp_path / "two" / "weights.pt")
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-6)
    for log in logs:
        # AdamW is invariant to the scale of the gradient; its norm is not
        for name in ("loss", "grad_norm", "logps/chosen", "eval_loss", "eval_nll_loss"):
            values = [row[name] for row in result.log_history if name in row]
            assert [row[name] for row in log if name in row] == pytest.approx(values, rel=1e-4), name


def test_sft_equals_orpo_without_odds_ratio_and_runs_no_rejected_completion(tmp_path):
    shared = {"max_steps": 2, "train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 1}
    orpo, weights = train(tmp_path / "orpo", TrainerArguments(objective=Orpo(beta=0.0), **shared), validation=2)
    sft, same = train(tmp_path / "sft", TrainerArguments(objective=Sft(), **shared), validation=2)
    for name, weight in weights.items():
        torch.testing.assert_close(same[name], weight, rtol=1e-4, atol=1e-6)
    assert sft.train_tokens < orpo.train_tokens
    kept = [chosen_only(example) for example in make_examples(8)]
    assert sft.train_tokens <= 2 * sum(len(row.prompt_ids) + sum(map(len, row.completions)) for row in kept)
    # the validation still runs them
    rejected = [[row["eval_logps/rejected"] for row in run.log_history if "eval_loss" in row] for run in (orpo, sft)]
    assert rejected[0] == pytest.approx(rejected[1], rel=1e-4)


def test_an_objective_without_its_reference_raises_an_error(tmp_path):
    with pytest.raises(UserError, match="objective: dpo needs reference"):
        train(tmp_path, TrainerArguments(objective=Dpo()))


def make_trl_trainer(folder, pairs, beta=0.5):
    rows = [
        {
            name: [{"role": message.role, "content": message.content} for message in getattr(pair, name)]
            for name in ("prompt", "chosen", "rejected")
        }
        for pair in pairs
    ]
    return ORPOTrainer(
        model=tiny_model(),
        args=ORPOConfig(output_dir=str(folder), beta=beta, max_length=2048, report_to="none", use_cpu=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )


def test_no_pairs_to_train_on_raise_an_error(tmp_path):
    with pytest.raises(UserError, match="no pairs"):
        train(tmp_path, TrainerArguments(), records=0)
