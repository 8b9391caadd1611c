"""How a student learns from preference pairs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, assert_never

from mint_ray.trainers.config import AnyTrainer, SharedPrefix

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from mint_ray.layouts import Example
    from mint_ray.records import PreferencePair


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What a training run has to say; the same on every worker. The model itself now holds the best weights."""

    log_history: list[dict[str, float]]
    """Rows of Hugging Face's log, oldest first, under TRL's names."""
    best_metric: float | None
    """Best value of `metric_for_best_model`; None without validation."""
    best_step: int | None
    global_step: int
    """Optimiser steps taken."""
    train_tokens: int
    """Tokens that went through the model in training over all workers, padding left out."""


class Trainer(Protocol):
    """A live trainer."""

    def tokenize(
        self, rows: list[PreferencePair], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[list[Example], dict[str, int]]:
        """Pairs as examples, and how many were dropped by reason. Raises UserError naming the record."""
        ...

    def run(
        self,
        *,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        train: list[Example],
        validation: list[Example],
        output_dir: Path,
        per_device_train_batch_size: int,
        per_device_eval_batch_size: int,
        num_workers: int,
        callbacks: list[TrainerCallback],
        resume_from_checkpoint: str | None,
    ) -> TrainResult:
        """Train `model` in place as one of `num_workers`; checkpoints go to `output_dir`. Raises UserError."""
        ...


def build_trainer(config: AnyTrainer) -> Trainer:
    """The live trainer of a config."""
    match config:
        case SharedPrefix():
            from mint_ray.trainers.shared_prefix import SharedPrefixTrainer

            return SharedPrefixTrainer(config)
        case _:
            assert_never(config)
