"""Commands for clusters with a fake Job API; tests/remote runs them against real heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from ray.job_submission import JobDetails

from mint_ray.cli import cli
from mint_ray.remote import jobs
from mint_ray.remote.chaos import Target
from mint_ray.remote.doctor import Finding
from tests.cli.commands import write_spec

ADDRESS = ["--address", "http://127.0.0.1:8265"]


class FakeClient:
    """Job API that keeps jobs in memory; each submitted job gets the state `status`."""

    def __init__(self, status: str = "RUNNING") -> None:
        self.status = status
        self.jobs: list[JobDetails] = []

    def get_address(self) -> str:
        return ADDRESS[1]

    def list_jobs(self) -> list[JobDetails]:
        return self.jobs

    def get_job_info(self, job_id: str) -> JobDetails:
        for job in self.jobs:
            if job.submission_id == job_id:
                return job
        raise RuntimeError("status code 404")

    def get_job_logs(self, job_id: str) -> str:
        return f"output of {job_id}\n" + json.dumps({"artifacts": {"prepare": "s3://bucket/prepare-1"}}) + "\n"

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: Any, metadata: Any) -> None:
        details: dict[str, Any] = {"type": "SUBMISSION", "status": self.status, "entrypoint": entrypoint}
        number = len(self.jobs) + 1
        self.jobs.append(
            JobDetails(
                **details,
                submission_id=submission_id,
                metadata=metadata,
                start_time=1000 * number,
                end_time=1000 * number,
            )
        )


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    fake = FakeClient()
    monkeypatch.setattr(jobs, "connect", lambda address: fake)
    return fake


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli, [*arguments, *ADDRESS])


def submit(folder: Path, *arguments: str) -> Any:
    spec = write_spec(folder, "{kind: hpo}")
    return invoke("submit", str(spec), "--shared-disk", *arguments)


def test_a_spec_submitted_twice_is_one_job_until_it_fails(client: FakeClient, tmp_path: Path) -> None:
    first = submit(tmp_path)
    assert first.exit_code == 0, first.output
    [job] = client.jobs
    assert first.output == f"job: {job.submission_id}\n"
    second = submit(tmp_path, "score.resources.batch_size=8")
    assert second.output.splitlines()[:2] == [
        f"job: {job.submission_id} (already on the cluster)",
        f"its resources differ from this spec's; to change them, first: mint-ray stop {job.submission_id}",
    ]
    client.status = client.jobs[0].status = "FAILED"  # type: ignore[assignment]
    assert submit(tmp_path).output == f"job: {job.submission_id}-2\n"


def test_a_job_that_succeeded_is_submitted_again_only_on_request(client: FakeClient, tmp_path: Path) -> None:
    client.status = "SUCCEEDED"
    submit(tmp_path)
    assert "already on the cluster" in submit(tmp_path).output
    assert submit(tmp_path, "--again").output == f"job: {client.jobs[0].submission_id}-2\n"


def test_a_dry_run_prints_the_package_and_submits_nothing(client: FakeClient, tmp_path: Path) -> None:
    done = submit(tmp_path, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "command: python -m mint_ray.cli run resolved-spec.yaml --json" in done.output
    assert "file: resolved-spec.yaml" in done.output
    assert client.jobs == []


def test_status_and_logs_print_a_job_and_its_artifacts(client: FakeClient, tmp_path: Path) -> None:
    client.status = "SUCCEEDED"
    submit(tmp_path)
    job_id = str(client.jobs[0].submission_id)
    one = invoke("status", job_id)
    assert one.output.splitlines() == [
        f"{job_id}: SUCCEEDED, exit code 0, 0 s; root {tmp_path / 'out'}",
        "prepare: s3://bucket/prepare-1",
    ]
    assert invoke("status").output.splitlines() == one.output.splitlines()[:1]
    assert invoke("logs", job_id).output.startswith(f"output of {job_id}\n")
    assert "no such job" in str(invoke("logs", "mint-ray-run-0").exception)


@pytest.mark.parametrize(("statuses", "code"), [(["ok", "unknown"], 0), (["ok", "fail", "ok"], 1)])
def test_doctor_exits_with_1_if_a_check_fails(statuses: list[Any], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [Finding("clocks", status, "text") for status in statuses]
    monkeypatch.setattr("mint_ray.remote.doctor.diagnose", lambda address, config: iter(findings))
    done = invoke("doctor")
    assert done.exit_code == code
    assert done.output.splitlines() == [f"{status:<8}clocks: text" for status in statuses]


def test_chaos_prints_its_seed_and_injects_nothing_in_a_dry_run(
    client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    injected: list[str] = []
    monkeypatch.setattr("mint_ray.remote.chaos.select_target", lambda client, fault, rng: Target("a" * 32, "10.0.0.2"))
    monkeypatch.setattr(
        "mint_ray.remote.chaos.inject_fault",
        lambda client, fault, target, **options: injected.append(fault) or {"detected_after": 2.5},
    )
    dry = invoke("chaos", "kill-node", "--seed", "7", "--dry-run")
    assert dry.output == "seed: 7\nkill-node: node 10.0.0.2 (aaaaaaaa)\n"
    assert injected == []
    done = invoke("chaos", "kill-node", "--seed", "7")
    assert done.output.splitlines()[-1] == "killed; the cluster detected the node failure after 2.5 s"
    assert injected == ["kill-node"]
