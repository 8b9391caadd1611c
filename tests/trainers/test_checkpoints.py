"""A run that is interrupted and resumed, on any number of workers, ends as an uninterrupted one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mint_ray.objectives.config import Orpo
from mint_ray.trainers.config import TrainerArguments, TrainResources
from tests.trainers.workers import StopAfter, tiny_adapter, train, train_on_workers

# saved between two rows of the log, in the middle of an epoch: the sums since the last row must be restored
CONFIG = TrainerArguments(
    objective=Orpo(beta=0.5), num_train_epochs=2, train_batch_size=4, eval_steps=2.0, learning_rate=3e-3,
    logging_steps=3, weight_decay=0.1,
)  # fmt: skip
RESOURCES = TrainResources(per_device_train_batch_size=2)
SHAPE = {"records": 15, "validation": 3}
FIGURES = ("loss", "grad_norm", "learning_rate", "nll_loss", "rewards/accuracies", "logps/rejected", "eval_loss")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def curve(log):
    return {name: [(row["step"], row[name]) for row in log if name in row] for name in FIGURES}


def assert_same_curve(log, expected, tolerance=1e-4):
    for name, points in curve(expected).items():
        assert points, name
        found = curve(log)[name]
        assert [step for step, _ in found] == [step for step, _ in points], name
        values = [value for _, value in points]
        assert [value for _, value in found] == pytest.approx(values, rel=tolerance, abs=1e-6), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return result and weights of an uninterrupted run of eight steps."""
    result, weights = train(tmp_path_factory.mktemp("through"), CONFIG, RESOURCES, model=tiny_adapter(), **SHAPE)
    assert result.global_step == 8
    return result, weights


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, uninterrupted):
    result, weights = uninterrupted
    first, again = tmp_path / "first", tmp_path / "again"
    train(first, CONFIG, RESOURCES, model=tiny_adapter(), callbacks=[StopAfter(4)], **SHAPE)
    resumed, found = train(again, CONFIG, RESOURCES, model=tiny_adapter(), resume=first / "checkpoint-4", **SHAPE)
    assert_same_curve(resumed.log_history, result.log_history, 1e-6)
    assert resumed.train_tokens == result.train_tokens
    assert (resumed.best_step, resumed.best_metric) == (result.best_step, pytest.approx(result.best_metric))
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-7)


def test_dropout_continues_with_the_same_random_numbers(tmp_path):
    def run(folder, **options):
        torch.manual_seed(3)
        return train(tmp_path / folder, CONFIG, RESOURCES, model=tiny_adapter(dropout=0.5), **SHAPE, **options)

    result, _ = run("through")
    run("first", callbacks=[StopAfter(4)])
    resumed, _ = run("again", resume=tmp_path / "first" / "checkpoint-4")
    assert_same_curve(resumed.log_history, result.log_history, 1e-6)


def test_the_best_weights_are_restored_after_a_resume_without_an_improvement(tmp_path):
    # with this learning rate the loss only increases
    config = TrainerArguments(
        train_batch_size=4, num_train_epochs=9, learning_rate=0.3, lr_scheduler_type="constant", warmup_ratio=0.0,
        eval_steps=1.0, early_stopping_patience=4, max_grad_norm=0.0,
    )  # fmt: skip
    shape = {"records": 4, "validation": 4}
    result, weights = train(tmp_path / "through", config, RESOURCES, **shape)
    stop = result.best_step + 2
    train(tmp_path / "first", config, RESOURCES, callbacks=[StopAfter(stop)], **shape)
    resumed, found = train(
        tmp_path / "again", config, RESOURCES, resume=tmp_path / "first" / f"checkpoint-{stop}", **shape
    )
    assert resumed.best_step == result.best_step
    assert resumed.global_step == result.global_step == result.best_step + 4
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=0)


def test_a_checkpoint_contains_the_trained_weights_and_no_pickle(tmp_path):
    train(tmp_path, CONFIG, RESOURCES, model=tiny_adapter(), callbacks=[StopAfter(2)], **SHAPE)
    folder = tmp_path / "checkpoint-2"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    parts = {"state/part-00000.safetensors", "best/part-00000.safetensors"}
    assert files == {"trainer_state.json", "position.json"} | parts
    names = {key.split(":")[1] for key in load_file(folder / "state" / "part-00000.safetensors")}
    assert names
    assert all("lora_" in name for name in names)


def test_zero_saves_the_moments_of_every_parameter_group(tmp_path):
    # norms are not decayed, so they are the second group of AdamW
    resources = TrainResources(per_device_train_batch_size=2, zero_stage=2)
    train_on_workers(1, tmp_path, CONFIG, resources, stop_after=2, **SHAPE)
    stored = load_file(tmp_path / "rank-0" / "checkpoint-2" / "state" / "part-00000.safetensors")
    kinds = {key.partition(":")[0] for key in stored if key.endswith("model.norm.weight")}
    assert len(kinds) == 3


@pytest.mark.slow
def test_runs_resume_from_two_workers_on_one_and_between_zero_stages(tmp_path: Path, uninterrupted):
    result, weights = uninterrupted
    zero_2, zero_3 = (TrainResources(per_device_train_batch_size=2, zero_stage=stage) for stage in (2, 3))

    def resume_on(folder, resume, resources):
        logs = train_on_workers(2, folder, CONFIG, resources, adapter=True, resume=resume, **SHAPE)
        for log in logs:
            assert_same_curve(log, result.log_history)

    ddp = tmp_path / "ddp"
    train_on_workers(2, ddp, CONFIG, RESOURCES, adapter=True, stop_after=2, **SHAPE)
    alone, found = train(
        tmp_path / "alone", CONFIG, RESOURCES, model=tiny_adapter(),
        resume=ddp / "rank-0" / "checkpoint-2", **SHAPE,
    )  # fmt: skip
    assert_same_curve(alone.log_history, result.log_history)
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-6)
    resume_on(tmp_path / "zero-2", tmp_path / "alone" / "checkpoint-4", zero_2)
    resume_on(tmp_path / "zero-3", tmp_path / "zero-2" / "rank-0" / "checkpoint-6", zero_3)
    last, found = train(
        tmp_path / "last", CONFIG, RESOURCES, model=tiny_adapter(),
        resume=tmp_path / "zero-3" / "rank-0" / "checkpoint-8", **SHAPE,
    )  # fmt: skip
    assert_same_curve(last.log_history, result.log_history)
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-5)
