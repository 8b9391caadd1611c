"""The conformance suite of trainers: what the train stage relies on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mint_ray.config.loader import UserError
from mint_ray.objectives.config import Orpo
from mint_ray.trainers import Trainer, TrainingRun, TrainResult
from mint_ray.trainers.config import TrainerArguments, TrainResources
from mint_ray.trainers.examples import InMemoryExamples
from tests.tiny import tiny_tokenizer
from tests.trainers.workers import StopAfter, make_examples, tiny_adapter

METRICS = {"nll_loss", "rewards/margins", "rewards/accuracies", "logps/chosen"}
CONFIG = TrainerArguments(
    objective=Orpo(nll_on="full"), train_batch_size=4, num_train_epochs=3, learning_rate=3e-3, eval_steps=2.0,
    logging_steps=1,
)  # fmt: skip


class StepRecorder(TrainerCallback):
    """A callback that records the optimizer steps."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step_end(self, args, state, control, **_):  # type: ignore[no-untyped-def]
        self.steps.append(state.global_step)


def check_trainer(build: Callable[[TrainerArguments], Trainer], folder: Path) -> None:
    """Assert that the trainers that `build` returns follow the `Trainer` protocol."""
    result, weights = _train(build, folder / "run")
    _check_result(result)
    _check_resume(build, folder, result, weights)
    result, _ = _train(build, folder / "no_validation", validation=0)
    assert result.best_metric is None
    assert result.best_step is None
    with pytest.raises(UserError, match="no pairs"):
        _train(build, folder / "no_records", records=0)


def _train(
    build: Callable[[TrainerArguments], Trainer],
    folder: Path,
    *,
    records: int = 8,
    validation: int = 3,
    callbacks: tuple[TrainerCallback, ...] = (),
    resume: Path | None = None,
) -> tuple[TrainResult, dict[str, Tensor]]:
    torch.set_num_threads(1)
    model: nn.Module = tiny_adapter()
    frozen = {name: weight.clone() for name, weight in model.named_parameters() if not weight.requires_grad}
    # one pair per record, so that records and pairs are the same batches
    examples = [_one_pair(example) for example in make_examples(records + validation)]
    run = TrainingRun(
        model=model, tokenizer=tiny_tokenizer(), train=InMemoryExamples(examples[:records]),
        validation=InMemoryExamples(examples[records:]), output_dir=folder,
        resources=TrainResources(per_device_train_batch_size=4), run_name="test", callbacks=callbacks,
        resume_from_checkpoint=resume,
    )  # fmt: skip
    result = build(CONFIG).train(run)
    trained = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    for name, weight in model.named_parameters():
        assert name not in frozen or torch.equal(weight, frozen[name]), f"{name} is frozen"
    return result, trained


def _one_pair(example):  # type: ignore[no-untyped-def]
    return dataclasses.replace(example, pairs=example.pairs[:1])


def _check_result(result: TrainResult) -> None:
    rows = [row for row in result.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[0].keys() >= METRICS
    validations = [row for row in result.log_history if "eval_loss" in row]
    assert [row["step"] for row in validations] == [2, 4, 6]
    assert validations[0].keys() >= {f"eval_{name}" for name in METRICS}
    assert result.best_metric == min(row["eval_loss"] for row in validations)
    assert result.best_step in (2, 4, 6)
    assert result.global_step == 6
    assert result.train_tokens > 0
    assert result.layout


def _check_resume(
    build: Callable[[TrainerArguments], Trainer], folder: Path, result: TrainResult, weights: dict[str, Tensor]
) -> None:
    _train(build, folder / "interrupted", callbacks=(StopAfter(4),))
    steps = StepRecorder()
    checkpoint = folder / "interrupted" / "checkpoint-4"
    resumed, found = _train(build, folder / "resumed", callbacks=(steps,), resume=checkpoint)
    assert steps.steps == [5, 6]
    for key in ("loss", "eval_loss"):
        expected = [row[key] for row in result.log_history if key in row]
        assert [row[key] for row in resumed.log_history if key in row] == pytest.approx(expected, rel=1e-5)
    assert (resumed.best_step, resumed.train_tokens) == (result.best_step, result.train_tokens)
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)
