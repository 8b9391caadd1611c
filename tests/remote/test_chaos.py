"""`mint-ray chaos` against a test cluster of a head and one node, while a small quickstart runs on it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mint_ray.artifacts import verify
from tests.cluster.test_two_nodes import STARTED, artifacts_of, small_quickstart
from tests.cluster_heads import KEEPALIVE, Head, kill, start_head

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

NODE = ("--num-cpus=2", "--object-store-memory=100000000")
LABELED_NODE = (*NODE, "--labels=mint-ray-chaos=1")


def test_a_run_continues_after_a_worker_and_then_its_node_are_killed(tmp_path: Path) -> None:
    with start_head("--num-cpus=0", **KEEPALIVE) as head:
        unlabeled = head.add_node(*NODE)
        for fault in ("kill-worker", "kill-node"):
            done = head.mint_ray("chaos", fault)
            assert done.returncode == 2
            assert "no node allows fault injection" in done.stderr
            assert "--labels=mint-ray-chaos=1" in done.stderr
        assert unlabeled.poll() is None
        kill(unlabeled)
        inject_faults_into_a_run(head, tmp_path)


def inject_faults_into_a_run(head: Head, tmp_path: Path) -> None:
    root, started = tmp_path / "out", time.monotonic()
    root.mkdir()
    log = root / "follow.log"
    node = head.add_node(*LABELED_NODE)
    idle = head.mint_ray("chaos", "kill-worker")
    assert idle.returncode == 2
    assert "no process with CPUs or GPUs of a running mint-ray job" in idle.stderr
    # long enough to select a target while it trains
    longer = ("train.trainer.max_steps=1000", "train.trainer.eval_steps=250")
    arguments = [*small_quickstart(tmp_path / "student"), *longer]
    follower = head.start_mint_ray("submit", *arguments, "--follow", "--root", str(root), log=log)

    try:
        while not any(root.glob(STARTED["train"])):
            assert follower.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() - started < 1200, log.read_text()[-4000:]
            time.sleep(0.05)
        planned = head.mint_ray("chaos", "kill-worker", "--seed", "7", "--dry-run")
        assert planned.returncode == 0, planned.stderr
        assert planned.stdout.startswith("seed: 7\nkill-worker: process ")
        assert "of mint-ray-run-" in planned.stdout
        worker = head.mint_ray("chaos", "kill-worker")
        assert worker.returncode == 0, worker.stderr
        assert worker.stdout.splitlines()[-1] == "killed"
        killed = head.mint_ray("chaos", "kill-node")
        assert killed.returncode == 0, killed.stderr
        assert "the cluster detected the node failure after" in killed.stdout
        print(worker.stdout, killed.stdout)
        assert node.wait(timeout=60) != 0
        head.add_node(*LABELED_NODE)
        assert follower.wait(timeout=900) == 0, log.read_text()[-4000:]
    finally:
        follower.kill()
        follower.wait()
    for uri in artifacts_of(root).values():
        assert verify(uri) == []
