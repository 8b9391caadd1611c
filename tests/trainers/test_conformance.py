"""Every trainer passes the conformance suite; so does a new one that follows the steps of the README."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
from transformers import TrainingArguments

from mint_ray.layouts.concatenated import ConcatenatedLayout
from mint_ray.objectives import build_objective
from mint_ray.trainers import TrainingRun, TrainResult, build_trainer
from mint_ray.trainers.config import TrainerArguments
from mint_ray.trainers.huggingface import check_examples, run_training, trainer_callbacks, training_arguments
from mint_ray.trainers.shared_prefix import PairTrainer
from tests.trainers.conformance import check_trainer


@pytest.mark.parametrize("kind", ["shared_prefix", "trl"])
def test_every_trainer_conforms(kind: Literal["shared_prefix", "trl"], tmp_path: Path) -> None:
    check_trainer(lambda config: build_trainer(dataclasses.replace(config, kind=kind)), tmp_path)


class PlainTrainer:
    """A new member: one row per completion, whatever the model supports."""

    def __init__(self, config: TrainerArguments) -> None:
        self.config = config

    def train(self, run: TrainingRun) -> TrainResult:
        check_examples(run)
        trainer = PairTrainer(
            build_objective(self.config.objective), ConcatenatedLayout(logits="all"),
            records_per_step=self.config.train_batch_size, train=run.train, validation=run.validation,
            model=run.model, args=training_arguments(TrainingArguments, self.config, run),
            processing_class=run.tokenizer, callbacks=trainer_callbacks(self.config, run),
        )  # fmt: skip
        return run_training(trainer, run, "concatenated")


def test_a_new_trainer_conforms(tmp_path: Path) -> None:
    check_trainer(PlainTrainer, tmp_path)


class ForgetfulTrainer(PlainTrainer):
    """A trainer that starts again instead of resuming."""

    def train(self, run: TrainingRun) -> TrainResult:
        return super().train(dataclasses.replace(run, resume_from_checkpoint=None))


def test_a_trainer_that_does_not_resume_does_not_conform(tmp_path: Path) -> None:
    # it ends with the same weights, but runs all steps again
    with pytest.raises(AssertionError):
        check_trainer(ForgetfulTrainer, tmp_path)
