"""The quickstart, small, on a head and a machine with addresses of their own; then with the machine lost in each stage.

They meet in a network namespace that has loopback alone, which takes root. The head does no work, so that with the machine
everything is lost that the stage holds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mint_ray.artifacts import find_artifact, verify
from tests.cluster_heads import KEEPALIVE, ROOT, Head, kill, lonely_network, start_head
from tests.test_pipeline import STAGES
from tests.tiny import save_tiny_student

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

MACHINE = ("--node-ip-address=127.0.0.3", "--num-cpus=2", "--object-store-memory=100000000")
FIRST_SIGNS = {
    "prepare": "mint-ray.log",
    "score": "runs/score-*/scores/*.done.json",
    "pair": "pair-*/train/*.parquet",
    "tokenize": "runs/tokenize-*/train/*.done.json",
    "train": "runs/train-*/step-*/position.json",
    "evaluate": "runs/answer-*/answers/*.done.json",
}
"""What lies below the root as soon as a stage is at work, and long before it is done."""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with (
        lonely_network() as within,
        start_head("--num-cpus=0", ip="127.0.0.2", within=within, **KEEPALIVE) as started,
    ):
        yield started


def small_quickstart(folder: Path) -> list[str]:
    """What makes of the quickstart a matter of two minutes, in many small parts."""
    return [
        str(ROOT / "jobs" / "quickstart.yaml"),
        "--shared-disk",
        "prepare.source={kind: hpo, diseases: 6, patients_per_disease: 18}",
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
def undisturbed(head: Head, arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a run to which nothing happened."""
    root = tmp_path_factory.mktemp("undisturbed")
    log, machine = root / "follow.log", head.join(*MACHINE)
    follower = head.start_mint_ray("submit", *arguments, "--follow", "--root", str(root), log=log)
    code = follower.wait(timeout=1200)
    kill(machine)
    assert code == 0, log.read_text()[-4000:]
    assert [line.split(": ")[0] for line in log.read_text().splitlines()[-len(STAGES) :]] == STAGES
    return root


def test_the_quickstart_runs_on_a_machine_that_is_not_the_head(undisturbed: Path) -> None:
    assert "ray: connected" in (undisturbed / "mint-ray.log").read_text()
    for stage in STAGES:
        assert verify(made(undisturbed, stage)) == []


def test_nobody_is_let_in_without_the_token(head: Head, arguments: list[str], tmp_path: Path) -> None:
    done = head.mint_ray("submit", *arguments, "--root", str(tmp_path / "out"), RAY_AUTH_MODE="disabled")
    assert done.returncode == 2
    assert "RAY_AUTH_TOKEN_PATH" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_whose_machine_is_lost_in_each_stage_ends_with_the_same_scores_and_pairs(
    head: Head, arguments: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    root, log, started = tmp_path / "out", tmp_path / "follow.log", time.monotonic()
    machine = head.join(*MACHINE)
    follower = head.start_mint_ray("submit", *arguments, "--follow", "--root", str(root), log=log)
    try:
        for stage, sign in FIRST_SIGNS.items():
            while not any(root.glob(sign)):
                assert follower.poll() is None, f"{stage}: the job is over: {log.read_text()[-4000:]}"
                assert time.monotonic() - started < 1200, f"{stage} is not reached: {log.read_text()[-4000:]}"
                time.sleep(0.02)
            kill(machine)
            assert not list(root.glob(f"{stage}-*/manifest.json")), f"{stage} was over before anything was lost"
            print(f"{time.monotonic() - started:.1f} s: lost the machine in {stage}", flush=True)
            machine = head.join(*MACHINE)
        assert follower.wait(timeout=600) == 0, log.read_text()[-4000:]
    finally:
        follower.kill()
        follower.wait()
    print(f"{time.monotonic() - started:.1f} s: the job has ended")
    for stage in STAGES:
        assert verify(made(root, stage)) == []
    for stage in ("score", "pair"):
        files = [find_artifact(made(place, stage), stage).manifest.files for place in (undisturbed, root)]
        assert files[0] == files[1]
    trained = [find_artifact(made(place, "train"), "train").manifest.metrics for place in (undisturbed, root)]
    assert trained[0]["steps"] == trained[1]["steps"] == 12
    assert trained[0]["best_metric"] == pytest.approx(trained[1]["best_metric"], rel=1e-4)


def made(root: Path, stage: str) -> str:
    (found,) = root.glob(f"{stage}-*")
    return str(found)
