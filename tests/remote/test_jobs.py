"""A tiny run submitted to a head in a process of its own, which asks for a token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobDetails

from mint_ray.artifacts import verify
from mint_ray.remote.jobs import exit_code, read_outcome
from tests.cluster_heads import Head, start_head
from tests.test_pipeline import STAGES, write_spec
from tests.tiny import save_tiny_student

ON_DISK = ("--shared-disk", "--follow")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with start_head() as started:
        yield started


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("submit")
    save_tiny_student(folder / "student")
    return write_spec(folder, folder / "student")


def jobs(head: Head) -> list[str]:
    return [line.split(";")[0] for line in head.mint_ray("status").stdout.splitlines()]


@pytest.mark.ray
@pytest.mark.slow
def test_a_followed_run_ends_with_its_artifacts_and_the_same_spec_again_is_that_run(head: Head, spec: Path) -> None:
    root = ("--root", str(spec.parent / "out"))
    first = head.mint_ray("submit", str(spec), *root, *ON_DISK)
    assert first.returncode == 0, first.stdout[-4000:] + first.stderr[-4000:]
    assert "train: 3 of 3 steps" in first.stdout
    ends = dict(line.split(": ", 1) for line in first.stdout.splitlines()[-len(STAGES) :])
    assert list(ends) == STAGES
    for uri in ends.values():
        assert verify(uri) == []

    job_id = first.stdout.splitlines()[0].removeprefix("job: ")
    again = head.mint_ray("submit", str(spec), *root, *ON_DISK, "score.resources.batch_size=8")
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[0] == f"job: {job_id} (on the cluster already)"
    assert f"mint-ray stop {job_id}" in again.stdout.splitlines()[1]
    assert again.stdout.splitlines()[-len(STAGES) :] == first.stdout.splitlines()[-len(STAGES) :]
    assert [line.split(":")[0] for line in jobs(head)].count(job_id) == 1

    well = head.mint_ray("doctor", str(spec), *root)
    assert well.returncode == 0, well.stdout
    assert "good    dashboard: asks for a token (status 401)" in well.stdout


@pytest.mark.ray
@pytest.mark.parametrize("token", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "not this one"}])
def test_nobody_gets_in_without_the_token(head: Head, spec: Path, token: dict[str, str]) -> None:
    for arguments in (["submit", str(spec), "--shared-disk"], ["status"], ["chaos", "kill-node"], ["stop", "x"]):
        done = head.mint_ray(*arguments, **token)
        assert done.returncode == 2
        assert done.stdout == ""
        said = [line for line in done.stderr.splitlines() if line.startswith("mint-ray:")]
        assert len(said) == 1
        assert "RAY_AUTH_TOKEN_PATH" in said[0]


@pytest.mark.ray
@pytest.mark.slow
def test_a_failed_or_stopped_run_is_sent_again_under_the_next_number(head: Head, spec: Path) -> None:
    bad = (str(spec), "--root", str(spec.parent / "bad"), "prepare.source={kind: phenopackets, uri: /none/here.jsonl}")
    first = head.mint_ray("submit", *bad, *ON_DISK)
    # what the user can mend has code 2, there as here
    assert first.returncode == 2
    job_id = first.stdout.splitlines()[0].removeprefix("job: ")
    assert "mint-ray: /none/here.jsonl: no such file" in first.stdout
    assert first.stdout.splitlines()[-1].startswith(f"{job_id}: FAILED, exit code 2")

    second = head.mint_ray("submit", *bad, "--shared-disk")
    assert second.stdout == f"job: {job_id}-2\n"
    stopped = head.mint_ray("stop", f"{job_id}-2")
    assert stopped.returncode == 0, stopped.stderr
    assert f"{job_id}-2: " in stopped.stdout
    assert head.mint_ray("submit", *bad, *ON_DISK).stdout.splitlines()[0] == f"job: {job_id}-3"
    logs = head.mint_ray("logs", f"{job_id}-3")
    assert "mint-ray: /none/here.jsonl: no such file" in logs.stdout


@pytest.mark.ray
def test_a_job_that_is_not_there_is_named(head: Head) -> None:
    done = head.mint_ray("status", "mint-ray-run-0")
    assert done.returncode == 2
    assert f"mint-ray: mint-ray-run-0: no such job at {head.address}" in done.stderr


@pytest.mark.ray
def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(head: Head, spec: Path) -> None:
    before = jobs(head)
    done = head.mint_ray(
        "submit",
        str(spec),
        "--root",
        "s3://bucket/dry",
        "--dry-run",
        "train.student.model_id=bundled:smollm2-135m-instruct",
    )
    assert done.returncode == 0, done.stderr
    assert "root: s3://bucket/dry" in done.stdout
    assert "file: resolved-spec.yaml" in done.stdout
    assert "0123456789abcdef" not in done.stdout  # the token
    assert jobs(head) == before


def test_a_cluster_that_is_not_there_is_named(spec: Path) -> None:
    nowhere = Head(0, "http://127.0.0.1:9", {}, spec.parent)
    done = nowhere.mint_ray("status")
    assert done.returncode == 2
    assert "mint-ray: http://127.0.0.1:9: nobody answers" in done.stderr
    assert "expected http://host:8265" in nowhere.mint_ray("status", "--address", "10.0.0.1:6379").stderr


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, 143),
        ("STOPPED", -15, 143),
    ],
)
def test_the_exit_code_is_that_of_the_jobs_command(state: str, code: int | None, expected: int) -> None:
    said: dict[str, Any] = {"type": "SUBMISSION", "status": state, "entrypoint": "x", "driver_exit_code": code}
    assert exit_code(JobDetails(**said)) == expected


def test_the_outcome_is_the_last_json_line_of_the_log() -> None:
    log = 'x\n{"artifacts": {"prepare": "a"}}\n{"artifacts": {"prepare": "b"}}\nwarning: something at exit\n'
    assert read_outcome(log) == {"artifacts": {"prepare": "b"}}
    assert read_outcome("nothing came of it\n") == {}
