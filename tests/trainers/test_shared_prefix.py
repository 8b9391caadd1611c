import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from mint_ray.loading import UserError, from_data
from mint_ray.records import Message, PreferencePair
from mint_ray.trainers import build_trainer
from mint_ray.trainers.config import AnyTrainer, SharedPrefix
from mint_ray.trainers.deepspeed import deepspeed_config
from mint_ray.trainers.shared_prefix import run_training
from mint_ray.trainers.tokenization import tokenize_pairs
from tests.tiny import tiny_model, tiny_tokenizer

NAMES = ["Noonan", "Marfan", "Kabuki", "Williams", "Rett"]
TRL_METRICS = {
    *("nll_loss", "log_odds_ratio", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected"),
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def to_pair(record_id, prompt, chosen, rejected):
    return PreferencePair(
        prompt=[Message(role="user", content=prompt)],
        chosen=[Message(role="assistant", content=chosen)],
        rejected=[Message(role="assistant", content=rejected)],
        record_id=record_id,
        split="train",
        teacher="",
        sampler="",
        chosen_labels=[],
        rejected_labels=[],
    )


def make_examples(records):
    """Records whose prompts, answers and numbers of pairs all differ in length."""
    pairs = [
        to_pair(
            f"r{record}",
            f"Case {record}: " + "short stature, " * (record % 4),
            f"1. {NAMES[record % 5]} syndrome",
            f"1. {NAMES[(record + 1 + pair) % 5]} syndrome" + " or a cough" * pair,
        )
        for record in range(records)
        for pair in range(1 + record % 3)
    ]
    return tokenize_pairs(pairs, tiny_tokenizer(), max_length=512)[0]


class KeepGradients(TrainerCallback):
    """The gradients of every optimiser step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: weight.grad.clone() for name, weight in model.named_parameters()})


def train(
    folder, config, *, model=None, records=8, validation=0, per_device=8, num_workers=1, callbacks=(), resume=None
):
    model = model or tiny_model()
    examples = make_examples(records + validation)
    result = run_training(
        config,
        model=model,
        tokenizer=tiny_tokenizer(),
        train=examples[:records],
        validation=examples[records:],
        output_dir=Path(folder),
        per_device_train_batch_size=per_device,
        per_device_eval_batch_size=per_device,
        num_workers=num_workers,
        callbacks=list(callbacks),
        resume_from_checkpoint=resume,
    )
    return result, {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("nll_on", ["full", "completion"])
def test_micro_batches_of_1_2_and_8_give_one_gradient(tmp_path, nll_on):
    # 12 records: the second step is only half full
    config = SharedPrefix(train_batch_size=8, max_grad_norm=0.0, nll_on=nll_on, learning_rate=1e-3, logging_steps=1)
    kept, losses = {}, {}
    for per_device in (8, 2, 1):
        gradients = KeepGradients()
        result, _ = train(tmp_path / str(per_device), config, records=12, per_device=per_device, callbacks=[gradients])
        kept[per_device] = gradients.steps
        losses[per_device] = [row["loss"] for row in result.log_history if "loss" in row]
    assert len(kept[8]) == 2
    for per_device in (2, 1):
        assert losses[per_device] == pytest.approx(losses[8], rel=1e-5)
        for step, expected in zip(kept[per_device], kept[8], strict=True):
            norm = torch.sqrt(sum((gradient**2).sum() for gradient in expected.values()))
            for name in expected:
                assert (step[name] - expected[name]).abs().max() / norm < 1e-5, name


def test_training_lowers_the_loss_and_keeps_the_best_checkpoint(tmp_path):
    config = SharedPrefix(
        learning_rate=3e-3, num_train_epochs=5, train_batch_size=4, logging_steps=1, bf16=False, eval_steps=0.25
    )
    result, _ = train(tmp_path, config, records=12, validation=3, per_device=2)
    losses = [row["loss"] for row in result.log_history if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    rows = [row for row in result.log_history if "nll_loss" in row]
    assert rows[0].keys() >= TRL_METRICS
    # the logged loss is what the gradient was taken of
    assert rows[0]["loss"] == pytest.approx(rows[0]["nll_loss"] - config.beta * rows[0]["log_odds_ratio"], rel=1e-5)
    assert rows[0]["rewards/chosen"] == pytest.approx(config.beta * rows[0]["logps/chosen"])
    validations = [row for row in result.log_history if "eval_loss" in row]
    assert len(validations) == 4
    assert validations[0].keys() >= {f"eval_{name}" for name in TRL_METRICS}
    assert result.best_metric == min(row["eval_loss"] for row in validations)
    assert result.best_step in [row["step"] for row in validations]
    assert result.global_step == 15
    examples = make_examples(12)
    tokens = sum(len(example.prompt_ids) + sum(map(len, example.completions)) for example in examples)
    assert 0.5 * 5 * tokens < result.train_tokens <= 5 * tokens
    saved = sorted(path.name for path in tmp_path.iterdir())
    assert f"checkpoint-{result.best_step}" in saved
    assert len(saved) == 2
    state = json.loads((tmp_path / saved[-1] / "trainer_state.json").read_text())
    assert state["best_global_step"] == result.best_step


def test_training_stops_early_and_ends_with_the_best_weights(tmp_path):
    # such a learning rate only makes it worse
    config = SharedPrefix(
        learning_rate=0.5, num_train_epochs=20, train_batch_size=4, eval_steps=1.0, early_stopping_patience=2,
        lr_scheduler_type="constant", warmup_ratio=0.0,
    )  # fmt: skip
    result, weights = train(tmp_path, config, records=4, validation=4, per_device=4)
    assert result.global_step < 20
    assert result.global_step == result.best_step + 2
    best = type(tiny_model()).from_pretrained(tmp_path / f"checkpoint-{result.best_step}")
    for name, weight in best.named_parameters():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=0)


def test_only_the_adapter_of_a_peft_model_is_trained_and_validation_may_be_empty(tmp_path):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(), lora)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    config = SharedPrefix(max_steps=2, learning_rate=1e-2, gradient_checkpointing=True, warmup_ratio=0.0)
    result, after = train(tmp_path, config, model=model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert result.best_metric is None
    assert result.best_step is None
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()


def test_validation_does_not_depend_on_its_batches_and_equals_trl(tmp_path):
    config = SharedPrefix(max_steps=1, train_batch_size=8, learning_rate=1e-30, nll_on="full")
    rows = []
    for per_device in (8, 2):
        result, _ = train(tmp_path / str(per_device), config, validation=5, per_device=per_device)
        rows.append(next(row for row in result.log_history if "eval_loss" in row))
    for name in ["loss", *TRL_METRICS]:
        assert rows[0][f"eval_{name}"] == pytest.approx(rows[1][f"eval_{name}"], rel=1e-5, abs=1e-6), name
    examples = make_examples(13)[8:]
    sides = {"chosen": 0, "rejected": 1}
    batch = {}
    for example in examples:
        for pair in example.pairs:
            for side, index in sides.items():
                completion = example.completions[pair[index]]
                ids = example.prompt_ids + completion
                batch.setdefault(f"{side}_input_ids", []).append(ids)
                batch.setdefault(f"{side}_labels", []).append([-100] * len(example.prompt_ids) + completion)
                batch.setdefault(f"{side}_attention_mask", []).append([1] * len(ids))
    padding = {"labels": -100, "mask": 0, "ids": 2}
    batch = {
        name: torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in values], batch_first=True, padding_value=padding[name.split("_")[-1]]
        )
        for name, values in batch.items()
    }
    trl = make_trl_trainer(tmp_path, [to_pair("a", "b", "c", "d")], beta=config.beta)
    loss, metrics = trl.get_batch_loss_metrics(trl.model, batch, train_eval="eval")
    assert rows[0]["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name in TRL_METRICS:
        assert rows[0][f"eval_{name}"] == pytest.approx(metrics[f"eval_{name}"], rel=1e-5, abs=1e-6), name


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(tmp_path):
    class StopAt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                control.should_training_stop = True

    config = SharedPrefix(num_train_epochs=2, train_batch_size=4, eval_steps=2.0, learning_rate=1e-3)
    through, expected = train(tmp_path / "through", config, records=10, validation=2, per_device=2)
    train(tmp_path / "broken", config, records=10, validation=2, per_device=2, callbacks=[StopAt()])
    resumed, actual = train(
        tmp_path / "broken", config, records=10, validation=2, per_device=2,
        resume=str(tmp_path / "broken" / "checkpoint-4"),
    )  # fmt: skip
    assert resumed.global_step == through.global_step == 6
    assert resumed.train_tokens == through.train_tokens
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-6, atol=1e-7)


def test_two_workers_end_with_the_weights_of_one(tmp_path):
    result, expected = train(tmp_path / "one", worker_config(), records=10, validation=3, per_device=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.trainers.test_shared_prefix", str(tmp_path / "two")],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[2],
        )
        for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    for rank in range(2):
        actual = torch.load(tmp_path / f"two-{rank}.pt")
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-6)
        log = json.loads((tmp_path / f"two-{rank}.json").read_text())
        # AdamW hides a wrong scale of the gradient from the weights; its norm shows it
        for name in ("loss", "grad_norm", "logps/chosen", "eval_loss", "eval_nll_loss"):
            values = [row[name] for row in result.log_history if name in row]
            assert [row[name] for row in log if name in row] == pytest.approx(values, rel=1e-4), name


def worker_config():
    return SharedPrefix(num_train_epochs=1, train_batch_size=4, learning_rate=1e-3, eval_steps=0.5, logging_steps=1)


def test_tokens_are_those_of_trl(tmp_path):
    pairs = [
        to_pair("a", "A boy with seizures.", "1. Noonan syndrome", "1. Rett syndrome 2. Marfan"),
        to_pair("b", "", "é", "\n\n1. Rett"),
    ]
    trl = make_trl_trainer(tmp_path, pairs)
    examples, _ = tokenize_pairs(pairs, tiny_tokenizer(), max_length=512)
    for example, row in zip(examples, trl.train_dataset, strict=True):
        for side, index in zip(("chosen", "rejected"), example.pairs[0], strict=True):
            completion = example.completions[index]
            assert example.prompt_ids + completion == row[f"{side}_input_ids"]
            assert [-100] * len(example.prompt_ids) + completion == row[f"{side}_labels"]


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


def test_pairs_of_one_record_become_one_example_and_long_ones_are_counted():
    pairs = [
        to_pair("a", "Case.", "Noonan", "Rett"),
        to_pair("b", "Case.", "Noonan", "Rett"),
        to_pair("a", "Case.", "Noonan", "Marfan"),
        to_pair("a", "Case.", "Noonan", "cough " * 100),
    ]
    examples, dropped = tokenize_pairs(pairs, tiny_tokenizer(), max_length=64)
    assert [example.record_id for example in examples] == ["a", "b"]
    assert [example.pairs for example in examples] == [[(0, 1), (0, 2)], [(0, 1)]]
    assert dropped == {"prompt_too_long": 1}


def test_an_empty_answer_is_refused_by_the_name_of_its_record():
    with pytest.raises(UserError, match="'case-7': rejected is empty"):
        tokenize_pairs([to_pair("case-7", "Case.", "Noonan", " ")], tiny_tokenizer(), max_length=64)


def test_an_answer_that_repeats_the_prompt_is_refused():
    pair = to_pair("case-7", "Case.", "Noonan", "Rett")
    pair.chosen.insert(0, pair.prompt[0])
    with pytest.raises(UserError, match="'case-7': chosen repeats the prompt"):
        tokenize_pairs([pair], tiny_tokenizer(), max_length=64)


def test_a_batch_that_cannot_be_cut_evenly_is_refused(tmp_path):
    with pytest.raises(UserError, match="got 8, no multiple of per_device_train_batch_size 3 times 2 workers"):
        train(tmp_path, SharedPrefix(), per_device=3, num_workers=2)


def test_no_pairs_to_train_on_is_refused(tmp_path):
    with pytest.raises(UserError, match="no pairs"):
        run_training(
            SharedPrefix(), model=tiny_model(), tokenizer=tiny_tokenizer(), train=[], validation=[],
            output_dir=tmp_path, per_device_train_batch_size=1, per_device_eval_batch_size=1, num_workers=1,
            callbacks=[], resume_from_checkpoint=None,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [("learning_rate", 0.0), ("beta", -1.0), ("warmup_ratio", 1.0), ("eval_steps", 2.5), ("max_steps", 0)],
)
def test_a_value_that_cannot_be_is_refused_with_its_name(key, value):
    with pytest.raises(UserError, match=f"{key} must .* got {value}"):
        from_data(AnyTrainer, {key: value})


def test_the_settings_name_their_trainer_and_import_nothing_heavy():
    trainer = build_trainer(from_data(AnyTrainer, {"kind": "shared_prefix", "max_length": 64}))
    examples, dropped = trainer.tokenize([to_pair("a", "Case.", "Noonan", "cough " * 100)], tiny_tokenizer())
    assert (examples, dropped) == ([], {"prompt_too_long": 1})
    code = "import sys, mint_ray.trainers.config; print({'torch', 'transformers', 'numpy', 'ray'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"


def test_zero_stage_becomes_deepspeed_settings_and_none_leaves_them_out():
    assert deepspeed_config(SharedPrefix()) is None
    assert deepspeed_config(SharedPrefix(zero_stage=2))["zero_optimization"]["stage"] == 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    outcome, trained = train(target, worker_config(), records=10, validation=3, per_device=2, num_workers=2)
    rank = os.environ["RANK"]
    torch.save(trained, target.with_name(f"{target.name}-{rank}.pt"))
    target.with_name(f"{target.name}-{rank}.json").write_text(json.dumps(outcome.log_history))
    # gloo's threads must be gone before the interpreter is, or it ends in an abort now and then
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
