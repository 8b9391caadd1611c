"""The doctor on a cluster with everything wrong with it, and its judgement of what it cannot be shown here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mint_ray.config.loader import from_data
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.remote.doctor import Finding, judge, judge_date, versions
from tests.cluster_heads import Head, start_head

CLOCK_AHEAD = """
import sys, time
if any("default_worker" in word for word in sys.orig_argv):  # what works there, not what starts it
    true = time.time
    time.time = lambda: true() + 60
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
def sick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """No token; storage that is off; a second machine with a clock and a mint-ray of its own; no GPU anywhere."""
    folder = tmp_path_factory.mktemp("sick")
    (folder / "sitecustomize.py").write_text(CLOCK_AHEAD)
    installed = folder / "mint_ray-0.0.1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: mint-ray\nVersion: 0.0.1\n")
    off = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "labkey",
        "AWS_SECRET_ACCESS_KEY": "labsecret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with start_head(token=None, **off) as head:
        head.join("--num-cpus=1", environment={"PYTHONPATH": f"{folder}:{head.environment['PYTHONPATH']}"})
        yield head


@pytest.mark.ray
@pytest.mark.slow
def test_every_planted_fault_is_found_in_a_line_of_its_own(sick: Head, tmp_path: Path) -> None:
    done = sick.mint_ray("doctor", str(write_spec(tmp_path)))
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    bad = [line.removeprefix("bad").strip() for line in lines if line.startswith("bad")]
    assert [line.split(":")[0] for line in bad] == ["dashboard", "versions", "clocks", "storage", "storage", "gpus"], (
        lines
    )
    door, drift, clock, head_storage, node_storage, gpus = bad
    assert door.startswith("dashboard: open")
    assert "has mint-ray 0.0.1, this machine 0.1.0" in drift
    assert "is +60.0 s from the head's" in clock or "is +59.9 s" in clock
    assert "from the head" in head_storage
    assert "s3://bucket/run: cannot be written" in node_storage
    assert gpus == "gpus: train asks for 2 x 1; 0 GPUs up, and no autoscaler adds any"


@pytest.mark.ray
def test_nobody_there_is_a_finding(tmp_path: Path) -> None:
    done = Head(0, "http://127.0.0.1:9", {}, tmp_path).mint_ray("doctor")
    assert done.returncode == 1
    assert done.stdout.startswith("bad     dashboard: http://127.0.0.1:9: nobody answers")


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
    healthy = {"versions": versions(), "skew": 0.01, "skew_error": 0.005, "storage": None}
    return {"address": address, "head": head, "gpus": gpus} | healthy | changes


def findings(nodes: list[dict[str, Any]], groups: Any, made: PipelineConfig) -> dict[str, Finding]:
    report = json.loads(json.dumps({"nodes": nodes, "groups": groups}))
    return {finding.about: finding for finding in judge(report, versions(), made)}


HEAD = node("10.0.0.1", head=True)


@pytest.mark.parametrize(
    ("up", "groups", "asked", "state", "text"),
    [
        ([1, 1], [], (1, 2), "good", "2 GPUs on 2 machines up, enough for every stage"),
        ([], [{"name": "gpu", "gpus": 1, "most": 4}], (1, 2), "good", "0 GPUs up; the autoscaler may have 4 GPUs on 4 machines"),
        ([], [{"name": "gpu", "gpus": 1, "most": 1}], (1, 2), "bad", "the autoscaler may have 1 GPU on 1 machine at most"),
        # one worker does not reach over two machines
        ([1, 1], [{"name": "gpu", "gpus": 1, "most": 4}], (2, 1), "bad", "train asks for 1 x 2"),
        ([], [{"name": "cpu", "gpus": 0, "most": 9}], (1, 1), "bad", "the autoscaler may have 0 GPUs at most"),
        ([1], [], (1, 2), "bad", "no autoscaler adds any"),
        ([1], "Forbidden: rayclusters", (1, 2), "unknown", "what the autoscaler could add is not known: Forbidden"),
        ([1], [], (0.5, 2), "good", "enough for every stage"),
        ([1], [], (1, [1, 8]), "good", "enough for every stage"),
        ([], [], (0, 2), "good", "the spec asks for none"),
    ],
)  # fmt: skip
def test_gpus_are_bad_only_if_they_are_neither_up_nor_to_be_had(
    up: list[float], groups: Any, asked: tuple[float, Any], state: str, text: str
) -> None:
    nodes = [HEAD, *(node(f"10.0.0.{9 + i}", gpus=gpus) for i, gpus in enumerate(up))]
    found = findings(nodes, groups, config(*asked))["gpus"]
    assert found.state == state, found
    assert text in found.text


def test_storage_that_no_worker_could_try_is_not_called_good() -> None:
    found = findings([HEAD], [], config(0))["storage"]
    assert found.state == "unknown"
    assert "only the head is up" in found.text
    assert findings([HEAD, node("10.0.0.2")], [], config(0))["storage"].state == "good"


def test_a_machine_without_mint_ray_or_with_another_python_drifts_and_a_micro_release_does_not() -> None:
    here = versions()
    major, minor, _ = here["python"].split(".")
    for changed, state in (
        ({"mint-ray": None}, "bad"),
        ({"python": f"{major}.{int(minor) + 1}.0"}, "bad"),
        ({"ray": "2.59.0"}, "bad"),
        ({"python": f"{major}.{minor}.99"}, "good"),
    ):
        found = findings([HEAD, node("10.0.0.2", versions=here | changed, storage=None)], [], config(0))
        assert found["versions"].state == state, changed


def test_a_machine_that_does_not_answer_is_named_and_the_others_are_judged() -> None:
    silent = {"address": "10.0.0.3", "head": False, "gpus": 0, "error": "GetTimeoutError: no answer"}
    found = findings([HEAD, node("10.0.0.2"), silent], [], config(0))
    assert found["machines"] == Finding(
        "machines", "bad", "machine 10.0.0.3 does not answer: GetTimeoutError: no answer"
    )
    assert found["versions"].state == "good"


def test_clocks_that_a_slow_answer_could_explain_are_not_called_wrong() -> None:
    slow = node("10.0.0.2", skew=6.0, skew_error=4.0)
    wrong = node("10.0.0.2", skew=-6.0, skew_error=0.1)
    assert "clocks" not in findings([HEAD, slow], [], config(0))
    assert findings([HEAD, wrong], [], config(0))["clocks"].text == "that of machine 10.0.0.2 is -6.0 s from the head's"


@pytest.mark.parametrize(
    ("before", "after", "state"),
    [(0.2, 0.4, "good"), (-4.5, -4.4, "good"), (-7, -6, "bad"), (7.5, 8, "bad"), (-20, 20, "good")],
)
def test_the_heads_clock_is_judged_within_what_date_and_answer_leave_open(
    before: float, after: float, state: str
) -> None:
    # Sat, 21 Nov 2026 17:34:55 GMT
    date, seconds = "Sat, 21 Nov 2026 17:34:55 GMT", 1795282495
    assert judge_date(date, seconds + before, seconds + after).state == state
