"""Settings of the trainers, under the argument names of Hugging Face's TrainingArguments."""

from __future__ import annotations

from typing import ClassVar, Literal

from mint_ray.config.loader import Resources, settings
from mint_ray.objectives.config import AnyObjective, Orpo


@settings
class TrainerArguments:
    """Training settings that affect the result; the same for every kind of trainer, so that they can be compared."""

    kind: Literal["shared_prefix", "trl"] = "shared_prefix"
    """`shared_prefix` runs a prompt once for all its completions; `trl` uses TRL's trainers on the same tokens."""
    objective: AnyObjective = Orpo()
    """Loss."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """Schedule of the learning rate after the warm-up."""
    warmup_ratio: float = 0.1
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Maximum norm of the gradients, to which larger ones are clipped; 0: no clipping."""
    num_train_epochs: float = 1.0
    """Number of passes over the records, unless `max_steps` is set."""
    max_steps: int = -1
    """Number of optimizer steps; -1: as many as `num_train_epochs` takes."""
    train_batch_size: int = 8
    """Records per optimizer step over all workers, so that the number of workers does not change the result."""
    max_length: int = 1024
    """Maximum number of tokens of a prompt with its longest completion."""
    overlong: Literal["drop", "truncate"] = "drop"
    """Records above `max_length`: `drop` them, or `truncate` their note at its end, never the instructions or
    completions. Both are counted."""
    eval_steps: float = 0.25
    """Interval of validations and checkpoints: in steps, or below 1 as a share of the run."""
    metric_for_best_model: str = "eval_loss"
    """Validation metric that selects the best checkpoint; higher is better unless its name ends in `loss`."""
    early_stopping_patience: int = 3
    """Number of consecutive validations without an improvement after which training stops."""
    logging_steps: int = 5
    """Interval of the rows of the log, in steps."""
    bf16: bool = False
    """Compute in bfloat16 under autocast; the loss is computed in float32."""
    seed: int = 0
    """Seed of the order of the records and of dropout."""

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
            raise ValueError(f"eval_steps must be a share below 1 or an integer, got {self.eval_steps}")
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(f"max_steps must be positive or -1, got {self.max_steps}")


@settings
class TrainResources(Resources):
    """Cluster resources for training; they change no result beyond rounding."""

    num_workers: int | tuple[int, int] = 1
    """Number of training workers; with [min, max] training is elastic: it continues on fewer workers after a failure
    and grows again."""
    cpus_per_worker: float = 2
    """CPUs, and arithmetic threads, per worker."""
    gpus_per_worker: float = 0
    """GPUs per worker."""
    per_device_train_batch_size: int = 4
    """Maximum number of records per forward pass; gradients accumulate up to `train_batch_size`."""
    per_device_eval_batch_size: int = 8
    """Records per forward pass of the validation."""
    max_tokens_per_row: int | None = None
    """Packing: several records share a row of at most this many tokens; null: one record per row."""
    attn_implementation: Literal["sdpa", "eager", "flex_attention"] = "sdpa"
    """Attention implementation of transformers. `flex_attention` skips masked blocks and trains on GPUs only; `eager`
    keeps all attention scores, and is faster on CPUs for short rows in bfloat16."""
    torch_compile: bool = False
    """Compile the layers. The first step takes a minute longer, or less with a warm compile cache; later steps are
    faster. On CPUs it needs a C++ compiler."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """DeepSpeed ZeRO stage: shards the optimizer state (1), also gradients (2), also weights (3) over the workers; null
    is plain DDP."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """State that ZeRO keeps in CPU memory: that of the optimizer or, at stage 3, the weights too."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Experiment trackers."""
    max_failures: int = 3
    """Maximum number of restarts from the last checkpoint after a worker failure; preempted nodes do not count."""

    renamed_keys: ClassVar[dict[str, str]] = {"row_tokens": "max_tokens_per_row"}

    def __post_init__(self) -> None:
        fewest, most = self.worker_range
        if not 1 <= fewest <= most:
            raise ValueError(f"num_workers must be positive or [min, max], got {self.num_workers}")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "max_tokens_per_row"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.offload != "none" and not self.zero_stage:
            raise ValueError(f"offload {self.offload} needs zero_stage 1, 2 or 3, got {self.zero_stage}")
        if self.torch_compile and self.zero_stage == 3:
            raise ValueError("torch_compile does not support the sharded weights of zero_stage 3; use stage 0, 1 or 2")
        if self.offload == "parameters" and self.zero_stage != 3:
            raise ValueError(f"offload parameters needs zero_stage 3, got {self.zero_stage}")

    @property
    def worker_range(self) -> tuple[int, int]:
        """Minimum and maximum number of workers."""
        return (self.num_workers, self.num_workers) if isinstance(self.num_workers, int) else self.num_workers
