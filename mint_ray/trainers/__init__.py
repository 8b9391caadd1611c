"""Trainers: the training of a student on preference pairs. Importing this loads no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, assert_never

from mint_ray.trainers.config import TrainerArguments, TrainResources

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from mint_ray.trainers.examples import Examples


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRun:
    """Inputs of one training run, apart from the trainer's own settings."""

    model: nn.Module
    """The student in training mode, with or without an adapter; it is trained in place."""
    tokenizer: PreTrainedTokenizerBase
    """The student's tokenizer."""
    train: Examples
    """Examples to train on."""
    validation: Examples
    """Examples for the validation; may be empty."""
    output_dir: Path
    """Local folder for checkpoints and logs."""
    resources: TrainResources
    """Batch sizes, engine and kernels."""
    run_name: str
    """Name of the run in experiment trackers."""
    callbacks: Sequence[TrainerCallback] = ()
    """Callbacks of Hugging Face's trainer."""
    resume_from_checkpoint: Path | None = None
    """Checkpoint to continue from. Rank 0 needs the complete folder, the other workers its `trainer_state.json`."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """Outcome of a training run, the same on every worker; the model itself has the best weights."""

    log_history: list[dict[str, float]]
    """Rows of Hugging Face's log, oldest first, under TRL's names."""
    best_metric: float | None
    """Best value of `metric_for_best_model`; None without validation."""
    best_step: int | None
    """Step of the best value; None without validation."""
    global_step: int
    """Number of optimizer steps."""
    train_tokens: int
    """Number of tokens that all workers ran through the model in training, without padding."""
    layout: str
    """Name of the layout of prompts and completions."""


class Trainer(Protocol):
    """A trainer."""

    def train(self, run: TrainingRun) -> TrainResult:
        """Train `run.model` in place, as a single process or as one worker of a torch.distributed group.

        Folders `checkpoint-<step>` are written to `run.output_dir` on rank 0. Raises UserError.
        """
        ...


def build_trainer(config: TrainerArguments) -> Trainer:
    """Build the trainer of a config. Raises UserError for a setting that the trainer does not support."""
    match config.kind:
        case "shared_prefix":
            from mint_ray.trainers.shared_prefix import SharedPrefixTrainer

            return SharedPrefixTrainer(config)
        case "trl":
            from mint_ray.trainers.trl import TrlTrainer

            return TrlTrainer(config)
        case _:
            assert_never(config.kind)


def check_trainer(config: TrainerArguments) -> None:
    """Raise UserError for a setting that the trainer does not support, or a package that it needs and is missing."""
    # the default trainer supports every setting; building it would load torch
    if config.kind != "shared_prefix":
        build_trainer(config)
