"""A small quickstart on a head and a node with separate addresses; then with a node failure in each stage.

Both run in a network namespace with loopback only, which requires root. The head runs no tasks, so that a node failure
loses everything that a stage has in memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mint_ray.artifacts import find_artifact, verify
from tests.cluster_heads import KEEPALIVE, ROOT, Head, isolated_network, kill, start_head
from tests.test_pipeline import STEPS
from tests.tiny import save_tiny_student

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

NODE = ("--node-ip-address=127.0.0.3", "--num-cpus=2", "--object-store-memory=100000000")
STARTED = {
    "prepare": "mint-ray.log",
    "score": "runs/score-*/scores/*.done.json",
    "pair": "pair-*/train/*.parquet",
    "tokenize": "runs/tokenize-*/train/*.done.json",
    "train": "runs/train-*/step-*/position.json",
    "answer": "runs/answer-*/answers/*.done.json",
}
"""Files below the root that a stage writes early, long before it is complete."""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with (
        isolated_network() as within,
        start_head("--num-cpus=0", ip="127.0.0.2", within=within, **KEEPALIVE) as running,
    ):
        yield running


def small_quickstart(folder: Path) -> list[str]:
    """Return arguments that make the quickstart take two minutes, in many small parts."""
    return [
        str(ROOT / "jobs" / "quickstart.yaml"),
        "--shared-disk",
        "prepare.source={kind: hpo, num_diseases: 6, patients_per_disease: 18}",
        "prepare.rows_per_part=4",
        f"train.student={{model_id: {save_tiny_student(folder)}, lora_rank: 2}}",
        "train.trainer.max_length=2048",
        "train.trainer.max_steps=12",
        "train.trainer.eval_steps=4",
        "train.trainer.train_batch_size=4",
        "train.resources={cpus_per_worker: 1, per_device_train_batch_size: 1}",
        "evaluate.generation.max_new_tokens=8",
        "evaluate.resources.cpus_per_actor=1",
    ]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return small_quickstart(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def uninterrupted(head: Head, arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run without failures; return its root."""
    root = tmp_path_factory.mktemp("uninterrupted")
    log, node = root / "follow.log", head.add_node(*NODE)
    follower = head.start_mint_ray("submit", *arguments, "--follow", "--root", str(root), log=log)
    code = follower.wait(timeout=1200)
    kill(node)
    assert code == 0, log.read_text()[-4000:]
    assert list(artifacts_of(root)) == STEPS
    return root


def test_the_quickstart_runs_on_a_node_other_than_the_head(uninterrupted: Path) -> None:
    assert "ray: connected" in (uninterrupted / "mint-ray.log").read_text()
    for uri in artifacts_of(uninterrupted).values():
        assert verify(uri) == []


def test_submitting_requires_the_token(head: Head, arguments: list[str], tmp_path: Path) -> None:
    done = head.mint_ray("submit", *arguments, "--root", str(tmp_path / "out"), RAY_AUTH_MODE="disabled")
    assert done.returncode == 2
    assert "RAY_AUTH_TOKEN_PATH" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_with_a_node_failure_in_each_stage_ends_with_the_same_scores_and_pairs(
    head: Head, arguments: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    root, started = tmp_path / "out", time.monotonic()
    root.mkdir()
    log = root / "follow.log"
    node = head.add_node(*NODE)
    follower = head.start_mint_ray("submit", *arguments, "--follow", "--root", str(root), log=log)
    try:
        for stage, pattern in STARTED.items():
            while not any(root.glob(pattern)):
                assert follower.poll() is None, f"{stage}: the job has ended: {log.read_text()[-4000:]}"
                assert time.monotonic() - started < 1200, f"{stage} did not start: {log.read_text()[-4000:]}"
                time.sleep(0.02)
            kill(node)
            assert not list(root.glob(f"{stage}-*/manifest.json")), f"{stage} was complete before the failure"
            print(f"{time.monotonic() - started:.1f} s: killed the node in {stage}", flush=True)
            node = head.add_node(*NODE)
        assert follower.wait(timeout=600) == 0, log.read_text()[-4000:]
    finally:
        follower.kill()
        follower.wait()
    print(f"{time.monotonic() - started:.1f} s: the job has ended")
    expected, found = artifacts_of(uninterrupted), artifacts_of(root)
    for uri in found.values():
        assert verify(uri) == []
    for stage in ("score", "pair"):
        assert find_artifact(found[stage], stage).manifest.files == find_artifact(expected[stage], stage).manifest.files
    trained = [find_artifact(artifacts["train"], "train").manifest.metrics for artifacts in (expected, found)]
    assert trained[0]["steps"] == trained[1]["steps"] == 12
    assert trained[0]["best_metric"] == pytest.approx(trained[1]["best_metric"], rel=1e-4)


def artifacts_of(root: Path) -> dict[str, str]:
    """Return the URIs in the last lines of a followed run's output, by step."""
    lines = (root / "follow.log").read_text().splitlines()[-len(STEPS) :]
    return dict(line.split(": ", 1) for line in lines)
