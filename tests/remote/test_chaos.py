"""A test cluster of a head and a machine is hit by `mint-ray chaos` while the quickstart, small, runs on it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mint_ray.artifacts import verify
from tests.cluster.test_two_nodes import FIRST_SIGNS, made, small_quickstart
from tests.cluster_heads import KEEPALIVE, Head, kill, start_head
from tests.test_pipeline import STAGES

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

MACHINE = ("--num-cpus=2", "--object-store-memory=100000000")
MAY_BE_HIT = (*MACHINE, "--labels=mint-ray-chaos=1")


def test_a_run_goes_on_when_a_worker_and_then_its_machine_are_killed(tmp_path: Path) -> None:
    with start_head("--num-cpus=0", **KEEPALIVE) as head:
        spared = head.join(*MACHINE)
        for what in ("kill-worker", "kill-node"):
            done = head.mint_ray("chaos", what)
            assert done.returncode == 2
            assert "no machine says that it may be hit" in done.stderr
            assert "--labels=mint-ray-chaos=1" in done.stderr
        assert spared.poll() is None
        kill(spared)
        hit_a_run(head, tmp_path)


def hit_a_run(head: Head, tmp_path: Path) -> None:
    root, log, started = tmp_path / "out", tmp_path / "follow.log", time.monotonic()
    machine = head.join(*MAY_BE_HIT)
    idle = head.mint_ray("chaos", "kill-worker")
    assert idle.returncode == 2
    assert "there is no process that holds a processor or GPU" in idle.stderr
    # long enough to take aim
    longer = ("train.trainer.max_steps=1000", "train.trainer.eval_steps=250")
    arguments = [*small_quickstart(tmp_path / "student"), *longer]
    follower = head.start_mint_ray("submit", *arguments, "--follow", "--root", str(root), log=log)

    try:
        while not any(root.glob(FIRST_SIGNS["train"])):
            assert follower.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() - started < 1200, log.read_text()[-4000:]
            time.sleep(0.05)
        named = head.mint_ray("chaos", "kill-worker", "--seed", "7", "--dry-run")
        assert named.returncode == 0, named.stderr
        assert named.stdout.startswith("seed: 7\nkill-worker: process ")
        assert "of mint-ray-run-" in named.stdout
        hit = head.mint_ray("chaos", "kill-worker")
        assert hit.returncode == 0, hit.stderr
        assert hit.stdout.splitlines()[-1] == "killed"
        lost = head.mint_ray("chaos", "kill-node")
        assert lost.returncode == 0, lost.stderr
        assert "the cluster missed it after" in lost.stdout
        print(hit.stdout, lost.stdout)
        assert machine.wait(timeout=60) != 0
        head.join(*MAY_BE_HIT)
        assert follower.wait(timeout=900) == 0, log.read_text()[-4000:]
    finally:
        follower.kill()
        follower.wait()
    for stage in STAGES:
        assert verify(made(root, stage)) == []
