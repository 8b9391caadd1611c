"""Rows are sharded over processes, and tensors are summed over them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import distributed, multiprocessing

from mint_ray.teachers.fusion.distributed import all_reduce_sum, device, shard


def run_rank(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    own = shard(range(5))
    total = all_reduce_sum(torch.tensor([float(sum(own)), 1.0]))
    torch.save((own, total), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_one_process_has_all_rows_and_sums_nothing() -> None:
    assert shard(range(3)) == [0, 1, 2]
    tensor = torch.ones(2)
    assert all_reduce_sum(tensor) is tensor
    assert tensor.tolist() == [1.0, 1.0]
    assert device().type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_two_processes_share_the_rows_and_get_the_sum(tmp_path: Path) -> None:
    multiprocessing.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    (first, total), (second, other_total) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert (first, second) == ([0, 2, 4], [1, 3])
    assert total.tolist() == other_total.tolist() == [10.0, 2.0]
