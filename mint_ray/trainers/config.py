"""Settings of the trainers, under Hugging Face's argument names."""

from __future__ import annotations

from typing import Literal

from mint_ray.config.loader import settings
from mint_ray.objectives.config import AnyObjective, Orpo


@settings
class Arguments:
    """How a student learns; the same for every kind of trainer, so that they can be compared."""

    kind: Literal["shared_prefix", "trl"] = "shared_prefix"
    """`shared_prefix` runs a prompt once for all its answers; `trl` is TRL's trainer on the same tokens."""
    objective: AnyObjective = Orpo()
    """What is minimised."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_ratio: float = 0.1
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them as they are."""
    num_train_epochs: float = 1.0
    """Passes over the records, unless `max_steps` is given."""
    max_steps: int = -1
    """Optimiser steps; -1 leaves it to `num_train_epochs`."""
    train_batch_size: int = 8
    """Records per optimiser step over all workers, so that the number of workers does not change the result."""
    max_length: int = 1024
    """Most tokens of prompt plus longest completion."""
    overlong: Literal["drop", "cut"] = "drop"
    """A longer record is dropped and counted, or its note is cut at the end and counted; nothing else is cut."""
    eval_steps: float = 0.25
    """How often to validate and save: below 1 a share of the run, otherwise a number of steps."""
    metric_for_best_model: str = "eval_loss"
    """Validation metric by which the best checkpoint is kept; higher is better unless its name ends in `loss`."""
    early_stopping_patience: int = 3
    """Stop after this many validations in a row without a new best."""
    logging_steps: int = 5
    """Steps between two rows of the log."""
    bf16: bool = False
    """Compute in bfloat16 under autocast; the loss stays in float32."""
    seed: int = 0
    """Order of the records and dropout."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "num_train_epochs", "train_batch_size", "max_length", "eval_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("early_stopping_patience", "logging_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must lie in [0, 1), got {self.warmup_ratio}")
        if self.eval_steps >= 1 and self.eval_steps != int(self.eval_steps):
            raise ValueError(f"eval_steps must be a share below 1 or whole, got {self.eval_steps}")
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(f"max_steps must be positive or -1, got {self.max_steps}")


@settings
class TrainResources:
    """What training asks of the cluster; changes no result beyond rounding."""

    num_workers: int | tuple[int, int] = 1
    """Training processes; [least, most] lets the run go on with the workers that are left, and grow again."""
    cpus_per_worker: float = 2
    """Processors, and arithmetic threads, of one worker."""
    gpus_per_worker: float = 0
    """GPUs of one worker."""
    per_device_train_batch_size: int = 4
    """Most records in one forward pass; gradients accumulate up to `train_batch_size`."""
    per_device_eval_batch_size: int = 8
    """Records in one forward pass of the validation."""
    row_tokens: int | None = None
    """Pack several records into rows of up to so many tokens; null gives each record a row."""
    attn_implementation: Literal["sdpa", "eager", "flex_attention"] = "sdpa"
    """Attention kernel; `flex_attention` skips what a mask hides, and trains on GPUs only; `eager` keeps what every
    token attends to, and is the faster one for short rows in bfloat16 on processors."""
    torch_compile: bool = False
    """Fuse what a layer does beside its products. The first step takes a minute longer (less once a machine has kept
    the kernels) and later ones less time; on processors it needs a C++ compiler."""
    gradient_checkpointing: bool = False
    """Work activations out again in the backward pass to save memory."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """DeepSpeed ZeRO: what is sharded over workers (1 optimiser, 2 gradients too, 3 weights too); null is plain DDP."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What ZeRO keeps in the memory of the processors: its optimiser state, or (stage 3) the weights too."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Trackers that follow the run."""
    max_failures: int = 3
    """How often the run is picked up from its last checkpoint after a worker died; preempted machines do not count."""

    def __post_init__(self) -> None:
        least, most = self.least_and_most_workers
        if not 1 <= least <= most:
            raise ValueError(f"num_workers must be positive or [least, most], got {self.num_workers}")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "row_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.offload != "none" and not self.zero_stage:
            raise ValueError(f"offload {self.offload} needs zero_stage 1, 2 or 3, got {self.zero_stage}")
        if self.torch_compile and self.zero_stage == 3:
            raise ValueError(
                "torch_compile cannot see weights that zero_stage 3 gathers as it goes; take stage 0, 1 or 2"
            )
        if self.offload == "parameters" and self.zero_stage != 3:
            raise ValueError(f"offload parameters needs zero_stage 3, got {self.zero_stage}")

    @property
    def least_and_most_workers(self) -> tuple[int, int]:
        return (self.num_workers, self.num_workers) if isinstance(self.num_workers, int) else self.num_workers
