"""How a student learns from preference pairs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, assert_never

from mint_ray.trainers.config import Arguments, TrainResources

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from mint_ray.trainers.examples import Examples


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
    layout: str
    """How prompts and completions were laid out."""


class Trainer(Protocol):
    """A live trainer."""

    def run(
        self,
        *,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        train: Examples,
        validation: Examples,
        output_dir: Path,
        resources: TrainResources,
        run_name: str,
        callbacks: list[TrainerCallback],
        resume_from_checkpoint: Path | None,
    ) -> TrainResult:
        """Train `model` in place, alone or as one worker of a torch.distributed group. Raises UserError.

        Folders `checkpoint-<step>` appear in `output_dir` on the first worker; `callbacks` do with them what they
        like. To resume, the first worker needs such a folder whole, the others its `trainer_state.json`.
        """
        ...


def build_trainer(config: Arguments) -> Trainer:
    """The live trainer of a config."""
    match config.kind:
        case "shared_prefix":
            from mint_ray.trainers.shared_prefix import SharedPrefixTrainer

            return SharedPrefixTrainer(config)
        case "trl":
            from mint_ray.trainers.trl import TrlTrainer

            return TrlTrainer(config)
        case _:
            assert_never(config.kind)
