"""The DeepSpeed configuration; Hugging Face's trainer fills in "auto" values from its own arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mint_ray.trainers.config import TrainerArguments, TrainResources


def deepspeed_config(config: TrainerArguments, resources: TrainResources) -> dict[str, Any] | None:
    """Return the value of `TrainingArguments(deepspeed=...)` for `resources.zero_stage`; None for plain DDP.

    ZeRO stages 1 to 3 shard optimizer state, gradients and weights over the workers (arXiv 1910.02054). With
    `config.bf16` the engine converts every weight to bfloat16 and keeps a float32 copy of the trained ones; otherwise
    weights keep their format.
    """
    if resources.zero_stage is None:
        return None
    return {
        "zero_optimization": _zero(resources),
        "bf16": {"enabled": config.bf16},
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        # always the trainer's optimizer: DeepSpeed's CPU optimizer is compiled on first use
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def _zero(resources: TrainResources) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    zero: dict[str, Any] = {
        "stage": resources.zero_stage,
        # uses a CUDA stream
        "overlap_comm": on_gpu,
        "contiguous_gradients": True,
        # hidden size squared; DeepSpeed allocates its default of 5e8 numbers in full, even for few trained weights
        "reduce_bucket_size": "auto",
    }
    if resources.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    # copies to a GPU are fast from page-locked memory
    device = {"device": "cpu", "pin_memory": on_gpu}
    if resources.offload != "none":
        zero["offload_optimizer"] = device
    if resources.offload == "parameters":
        zero["offload_param"] = device
    return zero


@contextmanager
def gathered_parameters(model: nn.Module, resources: TrainResources) -> Iterator[None]:
    """Gather the trained weights on every worker inside the block; ZeRO-3 shards them.

    All workers must enter the block.
    """
    if resources.zero_stage != 3:
        yield
        return
    import deepspeed

    trained = [weight for weight in model.parameters() if weight.requires_grad]
    with deepspeed.zero.GatheredParameters(trained):
        yield
