"""A tiny run, submitted to a head that requires a token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobDetails

from mint_ray.artifacts import verify
from mint_ray.remote.jobs import exit_code, read_outcome
from tests.cluster_heads import Head, start_head
from tests.test_pipeline import STEPS, write_spec
from tests.tiny import save_tiny_student

FOLLOW = ("--shared-disk", "--follow")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with start_head() as running:
        yield running


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("submit")
    save_tiny_student(folder / "student")
    return write_spec(folder, folder / "student")


def jobs(head: Head) -> list[str]:
    return [line.split(";")[0] for line in head.mint_ray("status").stdout.splitlines()]


@pytest.mark.ray
@pytest.mark.slow
def test_a_followed_run_ends_with_its_artifacts_and_resubmitting_returns_the_same_job(head: Head, spec: Path) -> None:
    root = ("--root", str(spec.parent / "out"))
    first = head.mint_ray("submit", str(spec), *root, *FOLLOW)
    assert first.returncode == 0, first.stdout[-4000:] + first.stderr[-4000:]
    assert "train: 3 of 3 steps" in first.stdout
    artifacts = dict(line.split(": ", 1) for line in first.stdout.splitlines()[-len(STEPS) :])
    assert list(artifacts) == STEPS
    for uri in artifacts.values():
        assert verify(uri) == []

    job_id = first.stdout.splitlines()[0].removeprefix("job: ")
    again = head.mint_ray("submit", str(spec), *root, *FOLLOW, "score.resources.batch_size=8")
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[0] == f"job: {job_id} (already on the cluster)"
    assert f"mint-ray stop {job_id}" in again.stdout.splitlines()[1]
    assert again.stdout.splitlines()[-len(STEPS) :] == first.stdout.splitlines()[-len(STEPS) :]
    assert [line.split(":")[0] for line in jobs(head)].count(job_id) == 1

    diagnosis = head.mint_ray("doctor", str(spec), *root)
    assert diagnosis.returncode == 0, diagnosis.stdout
    assert "ok      dashboard: requires a token (status 401)" in diagnosis.stdout


@pytest.mark.ray
@pytest.mark.parametrize("token", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "not this one"}])
def test_every_command_requires_the_token(head: Head, spec: Path, token: dict[str, str]) -> None:
    for arguments in (["submit", str(spec), "--shared-disk"], ["status"], ["chaos", "kill-node"], ["stop", "x"]):
        done = head.mint_ray(*arguments, **token)
        assert done.returncode == 2
        assert done.stdout == ""
        errors = [line for line in done.stderr.splitlines() if line.startswith("mint-ray:")]
        assert len(errors) == 1
        assert "RAY_AUTH_TOKEN_PATH" in errors[0]


@pytest.mark.ray
@pytest.mark.slow
def test_a_failed_or_stopped_job_is_submitted_again_under_the_next_number(head: Head, spec: Path) -> None:
    bad = (str(spec), "--root", str(spec.parent / "bad"), "prepare.source={kind: phenopackets, uri: /none/here.jsonl}")
    first = head.mint_ray("submit", *bad, *FOLLOW)
    # an error that the user can fix has exit code 2 on the cluster too
    assert first.returncode == 2
    job_id = first.stdout.splitlines()[0].removeprefix("job: ")
    assert "mint-ray: /none/here.jsonl: no such file" in first.stdout
    assert first.stdout.splitlines()[-1].startswith(f"{job_id}: FAILED, exit code 2")

    second = head.mint_ray("submit", *bad, "--shared-disk")
    assert second.stdout == f"job: {job_id}-2\n"
    stopped = head.mint_ray("stop", f"{job_id}-2")
    assert stopped.returncode == 0, stopped.stderr
    assert f"{job_id}-2: " in stopped.stdout
    assert head.mint_ray("submit", *bad, *FOLLOW).stdout.splitlines()[0] == f"job: {job_id}-3"
    logs = head.mint_ray("logs", f"{job_id}-3")
    assert "mint-ray: /none/here.jsonl: no such file" in logs.stdout


@pytest.mark.ray
def test_an_unknown_job_is_named(head: Head) -> None:
    done = head.mint_ray("status", "mint-ray-run-0")
    assert done.returncode == 2
    assert f"mint-ray: mint-ray-run-0: no such job at {head.address}" in done.stderr


@pytest.mark.ray
def test_a_dry_run_prints_the_package_and_submits_nothing(head: Head, spec: Path) -> None:
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


def test_a_cluster_that_does_not_respond_is_named(spec: Path) -> None:
    nowhere = Head(0, "http://127.0.0.1:9", {}, spec.parent)
    done = nowhere.mint_ray("status")
    assert done.returncode == 2
    assert "mint-ray: http://127.0.0.1:9: no response" in done.stderr
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
def test_the_exit_code_is_that_of_the_job(state: str, code: int | None, expected: int) -> None:
    details: dict[str, Any] = {"type": "SUBMISSION", "status": state, "entrypoint": "x", "driver_exit_code": code}
    assert exit_code(JobDetails(**details)) == expected


def test_the_outcome_is_the_last_json_line_of_the_log() -> None:
    log = 'x\n{"artifacts": {"prepare": "a"}}\n{"artifacts": {"prepare": "b"}}\nwarning: something at exit\n'
    assert read_outcome(log) == {"artifacts": {"prepare": "b"}}
    assert read_outcome("no result\n") == {}
