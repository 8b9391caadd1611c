"""`mint-ray doctor` on a cluster with every fault, and its findings from reports that cannot be produced here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mint_ray.config.loader import from_data
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.remote.doctor import Finding, check_date, check_report, local_versions
from tests.cluster_heads import Head, start_head

CLOCK_AHEAD = """
import sys, time
if any("default_worker" in word for word in sys.orig_argv):  # in workers, not in the processes that start them
    real = time.time
    time.time = lambda: real() + 60
"""


def write_spec(folder: Path) -> Path:
    path = folder / "spec.yaml"
    path.write_text("""
root: s3://bucket/run
task: {kind: rare_disease}
prepare: {source: {kind: hpo}}
train:
  student: {model_id: "bundled:smollm2-135m-instruct"}
  resources: {num_workers: [2, 4], gpus_per_worker: 1}
""")
    return path


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """Start a cluster without token, storage or GPU, and with a node whose clock and mint-ray differ."""
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "sitecustomize.py").write_text(CLOCK_AHEAD)
    installed = folder / "mint_ray-0.0.1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: mint-ray\nVersion: 0.0.1\n")
    unreachable = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "labkey",
        "AWS_SECRET_ACCESS_KEY": "labsecret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with start_head(token=None, **unreachable) as head:
        head.add_node("--num-cpus=1", environment={"PYTHONPATH": f"{folder}:{head.environment['PYTHONPATH']}"})
        yield head


@pytest.mark.ray
@pytest.mark.slow
def test_every_fault_gets_a_line_of_its_own(faulty: Head, tmp_path: Path) -> None:
    done = faulty.mint_ray("doctor", str(write_spec(tmp_path)))
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    failed = [line.removeprefix("fail").strip() for line in lines if line.startswith("fail")]
    assert [line.split(":")[0] for line in failed] == [
        "dashboard",
        "versions",
        "clocks",
        "storage",
        "storage",
        "gpus",
    ], lines
    dashboard, version, clock, head_storage, node_storage, gpus = failed
    assert dashboard.startswith("dashboard: open")
    assert "has mint-ray 0.0.1, this machine 0.1.0" in version
    assert "is +60.0 s from the head's" in clock or "is +59.9 s" in clock
    assert "from the head" in head_storage
    assert "s3://bucket/run: cannot be written" in node_storage
    assert gpus == "gpus: train requests 2 x 1; 0 GPUs up, and no autoscaler adds any"


@pytest.mark.ray
def test_a_cluster_that_does_not_respond_is_a_finding(tmp_path: Path) -> None:
    done = Head(0, "http://127.0.0.1:9", {}, tmp_path).mint_ray("doctor")
    assert done.returncode == 1
    assert done.stdout.startswith("fail    dashboard: http://127.0.0.1:9: no response")


def config(gpus: float = 1, workers: Any = 2) -> PipelineConfig:
    resources = {"num_workers": workers, "gpus_per_worker": gpus}
    student = {"model_id": "bundled:smollm2-135m-instruct"}
    return from_data(
        PipelineConfig,
        {
            "root": "s3://bucket/run",
            "task": {"kind": "rare_disease"},
            "prepare": {"source": {"kind": "hpo"}},
            "train": {"student": student, "resources": resources},
        },
    )


def node(address: str, head: bool = False, gpus: float = 0, **changes: Any) -> dict[str, Any]:
    healthy = {"versions": local_versions(), "skew": 0.01, "skew_error": 0.005, "storage": None}
    return {"address": address, "head": head, "gpus": gpus} | healthy | changes


def findings(nodes: list[dict[str, Any]], node_types: Any, made: PipelineConfig) -> dict[str, Finding]:
    report = json.loads(json.dumps({"nodes": nodes, "node_types": node_types}))
    return {finding.check: finding for finding in check_report(report, local_versions(), made)}


HEAD = node("10.0.0.1", head=True)


@pytest.mark.parametrize(
    ("up", "node_types", "demand", "status", "message"),
    [
        ([1, 1], [], (1, 2), "ok", "2 GPUs on 2 nodes up, enough for every stage"),
        ([], [{"name": "gpu", "gpus": 1, "max_workers": 4}], (1, 2), "ok", "0 GPUs up; the autoscaler can scale to 4 GPUs on 4 nodes"),
        ([], [{"name": "gpu", "gpus": 1, "max_workers": 1}], (1, 2), "fail", "the autoscaler can scale to at most 1 GPU on 1 node"),
        # one worker cannot use two nodes
        ([1, 1], [{"name": "gpu", "gpus": 1, "max_workers": 4}], (2, 1), "fail", "train requests 1 x 2"),
        ([], [{"name": "cpu", "gpus": 0, "max_workers": 9}], (1, 1), "fail", "the autoscaler can scale to at most 0 GPUs"),
        ([1], [], (1, 2), "fail", "no autoscaler adds any"),
        ([1], "Forbidden: rayclusters", (1, 2), "unknown", "the autoscaler's limits are unknown: Forbidden"),
        ([1], [], (0.5, 2), "ok", "enough for every stage"),
        ([1], [], (1, [1, 8]), "ok", "enough for every stage"),
        ([], [], (0, 2), "ok", "the spec requests none"),
    ],
)  # fmt: skip
def test_gpus_fail_only_if_they_are_neither_up_nor_addable(
    up: list[float], node_types: Any, demand: tuple[float, Any], status: str, message: str
) -> None:
    nodes = [HEAD, *(node(f"10.0.0.{9 + i}", gpus=gpus) for i, gpus in enumerate(up))]
    found = findings(nodes, node_types, config(*demand))["gpus"]
    assert found.status == status, found
    assert message in found.message


def test_storage_that_no_worker_checked_is_unknown() -> None:
    found = findings([HEAD], [], config(0))["storage"]
    assert found.status == "unknown"
    assert "only the head is up" in found.message
    assert findings([HEAD, node("10.0.0.2")], [], config(0))["storage"].status == "ok"


def test_versions_must_agree_except_for_pythons_micro_release() -> None:
    local = local_versions()
    major, minor, _ = local["python"].split(".")
    for changed, status in (
        ({"mint-ray": None}, "fail"),
        ({"python": f"{major}.{int(minor) + 1}.0"}, "fail"),
        ({"ray": "2.59.0"}, "fail"),
        ({"python": f"{major}.{minor}.99"}, "ok"),
    ):
        found = findings([HEAD, node("10.0.0.2", versions=local | changed, storage=None)], [], config(0))
        assert found["versions"].status == status, changed


def test_a_node_that_does_not_respond_is_named_and_the_others_are_checked() -> None:
    silent = {"address": "10.0.0.3", "head": False, "gpus": 0, "error": "GetTimeoutError: no answer"}
    found = findings([HEAD, node("10.0.0.2"), silent], [], config(0))
    assert found["nodes"] == Finding("nodes", "fail", "node 10.0.0.3 does not respond: GetTimeoutError: no answer")
    assert found["versions"].status == "ok"


def test_clock_skew_within_the_error_of_a_slow_response_is_accepted() -> None:
    slow = node("10.0.0.2", skew=6.0, skew_error=4.0)
    wrong = node("10.0.0.2", skew=-6.0, skew_error=0.1)
    assert "clocks" not in findings([HEAD, slow], [], config(0))
    assert (
        findings([HEAD, wrong], [], config(0))["clocks"].message
        == "the clock of node 10.0.0.2 is -6.0 s from the head's"
    )


@pytest.mark.parametrize(
    ("before", "after", "status"),
    [(0.2, 0.4, "ok"), (-4.5, -4.4, "ok"), (-7, -6, "fail"), (7.5, 8, "fail"), (-20, 20, "ok")],
)
def test_the_heads_clock_is_compared_within_the_resolution_of_the_date_header(
    before: float, after: float, status: str
) -> None:
    # Sat, 21 Nov 2026 17:34:55 GMT
    date, seconds = "Sat, 21 Nov 2026 17:34:55 GMT", 1795282495
    assert check_date(date, seconds + before, seconds + after).status == status
