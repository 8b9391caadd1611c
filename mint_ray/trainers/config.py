"""Settings of the trainers, under Hugging Face's argument names."""

from __future__ import annotations

from typing import Literal

from mint_ray.loading import settings


@settings
class SharedPrefix:
    """ORPO over pairs that share their prompt's forward pass."""

    kind: Literal["shared_prefix"] = "shared_prefix"
    beta: float = 0.5
    """Weight of the odds-ratio term; lambda in the ORPO paper, `beta` in TRL. 0 is SFT on the chosen completions."""
    nll_on: Literal["full", "completion"] = "completion"
    """Tokens of the likelihood term: the completion (the paper's equation 6) or prompt and completion (TRL)."""
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
    """Tokens of prompt plus longest completion; a longer pair is dropped and counted."""
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
    gradient_checkpointing: bool = False
    """Work activations out again in the backward pass to save memory."""
    seed: int = 0
    """Order of the records and dropout."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """DeepSpeed ZeRO: what is sharded over workers (1 optimiser, 2 gradients too, 3 weights too); None is plain DDP."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "num_train_epochs", "train_batch_size", "max_length", "eval_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("early_stopping_patience", "logging_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("beta", "weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must lie in [0, 1), got {self.warmup_ratio}")
        if self.eval_steps >= 1 and self.eval_steps != int(self.eval_steps):
            raise ValueError(f"eval_steps must be a share below 1 or whole, got {self.eval_steps}")
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(f"max_steps must be positive or -1, got {self.max_steps}")


AnyTrainer = SharedPrefix
"""Every trainer. A second one makes this `Annotated[SharedPrefix | ..., Field(discriminator="kind")]`."""
