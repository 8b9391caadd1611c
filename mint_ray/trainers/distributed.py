"""Rank and world size of this process, and a broadcast, with or without a torch.distributed group.

Tested by tests/trainers/test_checkpoints.py.
"""

from __future__ import annotations

from typing import Any

import torch.distributed


def rank() -> int:
    """Return the rank of this process; 0 without a process group."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes; 1 without a process group."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def broadcast(value: Any) -> Any:
    """Return rank 0's value on every worker. All workers must call this."""
    if world_size() == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, 0)
    return values[0]
