"""The parts around Hugging Face's trainer that all our trainers share: arguments, callbacks, result.

Tested by tests/trainers/test_shared_prefix.py and tests/trainers/test_trl.py.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
import transformers
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, TrainingArguments

from mint_ray.config.loader import UserError
from mint_ray.trainers import TrainingRun, TrainResult
from mint_ray.trainers.config import TrainerArguments
from mint_ray.trainers.deepspeed import deepspeed_config
from mint_ray.trainers.distributed import world_size

T = TypeVar("T", bound=TrainingArguments)


def training_arguments(cls: type[T], config: TrainerArguments, run: TrainingRun, **options: Any) -> T:
    """Return the arguments of Hugging Face's trainer for one worker.

    Gradients accumulate over as many micro-batches as `train_batch_size` records need on these workers.

    Args:
        cls: TrainingArguments or a subclass of TRL.
        config: Settings of the trainer.
        run: The run.
        **options: Arguments that only `cls` has.
    """
    resources, validate = run.resources, bool(len(run.validation))
    records_per_worker = math.ceil(config.train_batch_size / world_size())
    arguments: T = cls(
        output_dir=str(run.output_dir),
        run_name=run.run_name,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=resources.per_device_train_batch_size,
        per_device_eval_batch_size=resources.per_device_eval_batch_size,
        gradient_accumulation_steps=math.ceil(records_per_worker / resources.per_device_train_batch_size),
        eval_strategy="steps" if validate else "no",
        eval_steps=config.eval_steps if validate else None,
        save_strategy="steps",
        save_steps=config.eval_steps,
        load_best_model_at_end=validate,
        metric_for_best_model=config.metric_for_best_model if validate else None,
        restore_callback_states_from_checkpoint=True,
        logging_steps=config.logging_steps,
        # NaN must show in the log instead of being replaced
        logging_nan_inf_filter=False,
        bf16=config.bf16,
        gradient_checkpointing=resources.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if resources.gradient_checkpointing else None,
        deepspeed=deepspeed_config(config, resources),
        seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=list(resources.report_to) or "none",
        **options,
    )
    return arguments


def trainer_callbacks(config: TrainerArguments, run: TrainingRun) -> list[TrainerCallback]:
    """Return the callbacks of the run, and early stopping if there is a validation."""
    stopping = EarlyStoppingCallback(early_stopping_patience=config.early_stopping_patience)
    return [*run.callbacks, *([stopping] if len(run.validation) else [])]


def check_examples(run: TrainingRun) -> None:
    """Raise UserError if there is nothing to train on."""
    if not len(run.train):
        raise UserError("no pairs to train on")


def run_training(trainer: transformers.Trainer, run: TrainingRun, layout: str) -> TrainResult:
    """Train from the start or from `run.resume_from_checkpoint`, and return the result."""
    # it prints every row of the log; callers have their own callbacks
    trainer.remove_callback(PrinterCallback)
    checkpoint = run.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    state = trainer.state
    return TrainResult(
        log_history=list(state.log_history),
        best_metric=state.best_metric,
        best_step=state.best_global_step,
        global_step=state.global_step,
        train_tokens=int(state.num_input_tokens_seen),
        layout=layout,
    )
