"""DeepSpeed's settings as data; "auto" is what Hugging Face's trainer fills in from its own arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mint_ray.trainers.config import Arguments, TrainResources


def deepspeed_config(config: Arguments, resources: TrainResources) -> dict[str, Any] | None:
    """ZeRO at `resources.zero_stage` for `TrainingArguments(deepspeed=...)`; None where plain DDP is asked for.

    ZeRO 1 to 3 split optimiser state, gradients and weights over the workers (arXiv 1910.02054). With `config.bf16` the
    engine turns every weight into bfloat16 and keeps a float32 copy of those it trains; without it, weights stay as
    they are.
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
        # the optimiser is the trainer's own, whatever holds its state: DeepSpeed's for the CPU is compiled on first use
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def _zero(resources: TrainResources) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    zero: dict[str, Any] = {
        "stage": resources.zero_stage,
        # a stream of its own for communication, which only a GPU has
        "overlap_comm": on_gpu,
        "contiguous_gradients": True,
        # hidden size squared; DeepSpeed's own 5e8 numbers are allocated in full, however few weights are trained
        "reduce_bucket_size": "auto",
    }
    if resources.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    # page-locked memory is what copies to a GPU are fast from
    place = {"device": "cpu", "pin_memory": on_gpu}
    if resources.offload != "none":
        zero["offload_optimizer"] = place
    if resources.offload == "parameters":
        zero["offload_param"] = place
    return zero


@contextmanager
def gathered(model: nn.Module, resources: TrainResources) -> Iterator[None]:
    """Within the block every worker holds the trained weights whole; ZeRO-3 leaves each with a part of them.

    All workers must enter the block.
    """
    if resources.zero_stage != 3:
        yield
        return
    import deepspeed

    trained = [weight for weight in model.parameters() if weight.requires_grad]
    with deepspeed.zero.GatheredParameters(trained):
        yield
