"""Turn our settings into Hugging Face's training arguments, for every trainer alike."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments

from mint_ray.trainers.config import Arguments, TrainResources
from mint_ray.trainers.deepspeed import deepspeed_config

T = TypeVar("T", bound=TrainingArguments)


def training_arguments(
    cls: type[T],
    config: Arguments,
    resources: TrainResources,
    *,
    output_dir: Path,
    validate: bool,
    world_size: int,
    run_name: str,
    **more: Any,
) -> T:
    """`cls` (TrainingArguments or one of TRL's) for one of `world_size` workers; `more` are its own arguments.

    Gradients accumulate over as many micro-batches as `train_batch_size` records take on these workers.
    """
    share = math.ceil(config.train_batch_size / world_size)
    arguments: T = cls(
        output_dir=str(output_dir),
        run_name=run_name,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=resources.per_device_train_batch_size,
        per_device_eval_batch_size=resources.per_device_eval_batch_size,
        gradient_accumulation_steps=math.ceil(share / resources.per_device_train_batch_size),
        eval_strategy="steps" if validate else "no",
        eval_steps=config.eval_steps if validate else None,
        save_strategy="steps",
        save_steps=config.eval_steps,
        load_best_model_at_end=validate,
        metric_for_best_model=config.metric_for_best_model if validate else None,
        restore_callback_states_from_checkpoint=True,
        logging_steps=config.logging_steps,
        # a NaN must be seen, not smoothed over
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
        **more,
    )
    return arguments
