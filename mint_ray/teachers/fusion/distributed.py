"""Functions for the processes of torch.distributed that train one network together; one process needs no group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import distributed

Tensor = torch.Tensor


def shard(rows: Sequence[int]) -> list[int]:
    """Return this process's share of `rows`, which every process has."""
    if not distributed.is_initialized():
        return list(rows)
    return list(rows[distributed.get_rank() :: distributed.get_world_size()])


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place, and return it."""
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor


def device() -> torch.device:
    """Return the GPU of this process, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
