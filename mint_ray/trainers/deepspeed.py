"""DeepSpeed's settings as data; "auto" is what Hugging Face's trainer fills in from its own arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from mint_ray.trainers.config import AnyTrainer


def deepspeed_config(config: AnyTrainer) -> dict[str, Any] | None:
    """ZeRO at `config.zero_stage` for `TrainingArguments(deepspeed=...)`; None where plain DDP is asked for."""
    if config.zero_stage is None:
        return None
    zero: dict[str, Any] = {"stage": config.zero_stage, "overlap_comm": True, "contiguous_gradients": True}
    if config.zero_stage == 3:
        zero |= {
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


@contextmanager
def gathered(model: nn.Module, config: AnyTrainer) -> Iterator[None]:
    """Within the block every worker holds the trained weights whole; ZeRO-3 leaves each with a part of them.

    All workers must enter the block.
    """
    if config.zero_stage != 3:
        yield
        return
    import deepspeed

    trained = [weight for weight in model.parameters() if weight.requires_grad]
    with deepspeed.zero.GatheredParameters(trained):
        yield
