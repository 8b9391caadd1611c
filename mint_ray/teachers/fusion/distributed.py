"""What the processes that train one network together agree on; a process alone agrees with itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import distributed

Tensor = torch.Tensor


def share_of(rows: Sequence[int]) -> list[int]:
    """This process's rows of those that all processes know of."""
    if not distributed.is_initialized():
        return list(rows)
    return list(rows[distributed.get_rank() :: distributed.get_world_size()])


def total(tensor: Tensor) -> Tensor:
    """The sum of the tensors that each process has, in each process; `tensor` itself is changed."""
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor


def leads() -> bool:
    """Whether this process is the one that speaks for all."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
