"""Jobs on a cluster through Ray's Job API: submit, follow, stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import shlex
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from mint_ray.config.loader import UserError, one_line
from mint_ray.remote.package import JobPackage

SETUP_SECONDS = 600
"""Timeout for installing a job's requirements; without one Ray keeps the job PENDING."""
SIGTERM = 15
MAX_RECONNECTS = 20
RECONNECT_SECONDS = 3
"""Pause between two attempts to reach the cluster while a job is followed."""

TOKEN_ADVICE = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"  # noqa: S105

logger = logging.getLogger("mint_ray")


@dataclass(frozen=True, slots=True)
class Submission:
    """Result of submitting a job package."""

    job_id: str
    is_new: bool
    """False if the cluster already has the job."""
    same_resources: bool = True
    """False if the cluster's job has other `resources` than the spec."""


def connect(address: str) -> JobSubmissionClient:
    """Connect to the Job API of the cluster whose dashboard is at `address` (http:// or https://).

    Token and certificates come from the environment, as for `ray job`: RAY_AUTH_MODE, RAY_AUTH_TOKEN or
    RAY_AUTH_TOKEN_PATH, REQUESTS_CA_BUNDLE.

    Raises:
        UserError: The address is malformed, nothing responds there, or the token is rejected.
    """
    if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).hostname:
        raise UserError(f"address {address!r}: expected http://host:8265 or https://host")
    # RAY_ADDRESS, which is for drivers, would take precedence over the argument
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    for verbose in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(verbose).setLevel(logging.ERROR)
    try:
        return JobSubmissionClient(address, verify=os.environ.get("REQUESTS_CA_BUNDLE") or True)
    except AuthenticationError as error:
        # the first line is the error; Ray's advice follows
        raise UserError(f"{address}: {str(error).splitlines()[0]}; {TOKEN_ADVICE}") from error
    except (OSError, requests.RequestException) as error:
        raise UserError(f"{address}: no response: {one_line(error)}") from error


def name_job(package: JobPackage) -> str:
    """Return the submission id of a package; resubmissions get a numeric suffix."""
    return f"mint-ray-{package.verb}-{package.fingerprint}"


def submit(client: JobSubmissionClient, package: JobPackage, *, again: bool = False) -> Submission:
    """Submit a package unless the cluster already has its job pending, running or succeeded.

    A failed or stopped job is submitted again under the next number; with `again`, so is one that succeeded.

    Raises:
        RuntimeError: The cluster rejects the job.
    """
    while True:
        number, latest = _find_latest(client, package)
        if latest is not None and not _may_resubmit(latest, again):
            same_resources = (latest.metadata or {}).get("resources") == package.resources
            return Submission(str(latest.submission_id), is_new=False, same_resources=same_resources)
        job_id = name_job(package) + (f"-{number + 1}" if number else "")
        try:
            _send(client, package, job_id)
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise
            continue  # another client submitted the same job at the same time
        return Submission(job_id, is_new=True)


def get_job(client: JobSubmissionClient, job_id: str) -> JobDetails:
    """Return the details of a job. Raises UserError if the cluster does not have it."""
    try:
        return client.get_job_info(job_id)
    except RuntimeError as error:
        if "404" not in str(error):
            raise
        raise UserError(f"{job_id}: no such job at {client.get_address()}") from error


def list_jobs(client: JobSubmissionClient) -> list[JobDetails]:
    """Return all submitted jobs of the cluster, oldest first."""
    return sorted((job for job in client.list_jobs() if job.submission_id), key=lambda job: job.start_time or 0)


def stop(client: JobSubmissionClient, job_id: str) -> JobDetails:
    """Stop a job and wait until it has ended."""
    get_job(client, job_id)
    client.stop_job(job_id)
    return _wait(client, job_id)


def read_logs(client: JobSubmissionClient, job_id: str) -> str:
    """Return the output of a job so far."""
    get_job(client, job_id)
    return str(client.get_job_logs(job_id))


def follow(client: JobSubmissionClient, job_id: str, write: Callable[[str], None]) -> JobDetails:
    """Pass the output of a job to `write` until the job has ended; reconnect after a lost connection.

    Raises:
        ConnectionError: The cluster has not responded for a minute.
    """
    get_job(client, job_id)
    output = _JobOutput(write)
    attempts = 0
    while attempts < MAX_RECONNECTS:
        before = output.characters
        try:
            asyncio.run(_tail(client, job_id, output))
            return _wait(client, job_id)
        except (OSError, RuntimeError, requests.RequestException, aiohttp.ClientError) as error:
            logger.warning("%s: connection lost (%s); reconnecting", job_id, one_line(error))
        attempts = 1 if output.characters > before else attempts + 1
        time.sleep(RECONNECT_SECONDS)
    raise ConnectionError(f"{job_id}: {client.get_address()} no longer responds; the job may still be running")


def run_agent(
    client: JobSubmissionClient, module: str, arguments: Sequence[str], *, purpose: str, timeout: float
) -> dict[str, Any]:
    """Run a module of `mint_ray.remote` as a script on the head, and return the object that it prints.

    The script is sent as a job of its own, `mint-ray-PURPOSE-...`, which is deleted afterwards. Its result is the last
    output line of the form `{"MODULE": ...}`.

    Raises:
        RuntimeError: The script fails.
        TimeoutError: It does not end within `timeout` seconds.
    """
    job_id = f"mint-ray-{purpose}-{uuid.uuid4().hex[:12]}"
    with tempfile.TemporaryDirectory(prefix="mint-ray-") as folder:
        (Path(folder) / f"{module}.py").write_bytes(files("mint_ray.remote").joinpath(f"{module}.py").read_bytes())
        client.submit_job(
            entrypoint=shlex.join(["python", f"{module}.py", *arguments]),
            submission_id=job_id,
            runtime_env={"working_dir": folder, "config": {"setup_timeout_seconds": int(timeout)}},
        )
    deadline = time.monotonic() + timeout
    while not (job := client.get_job_info(job_id)).status.is_terminal():
        if time.monotonic() > deadline:
            client.stop_job(job_id)
            raise TimeoutError(f"did not end within {timeout:g} s; {job.message}")
        time.sleep(0.5)
    logs = client.get_job_logs(job_id)
    with contextlib.suppress(RuntimeError):
        client.delete_job(job_id)
    for line in reversed(logs.splitlines()):
        if line.startswith(f'{{"{module}"'):
            result: dict[str, Any] = json.loads(line)[module]
            return result
    output = [line for line in logs.splitlines() if line.strip()]
    raise RuntimeError(f"failed on the head: {output[-1] if output else job.message}")


def exit_code(job: JobDetails) -> int:
    """Return the exit code of the job's command; 128 plus the signal number if a signal ended it, as in a shell."""
    if job.status == JobStatus.SUCCEEDED:
        return 0
    if job.driver_exit_code is not None:
        code = int(job.driver_exit_code)
        return code if code >= 0 else 128 - code
    return 128 + SIGTERM if job.status == JobStatus.STOPPED else 1


def read_outcome(logs: str) -> dict[str, Any]:
    """Return the JSON object at the end of a run's output (artifacts, metrics, seconds); empty if there is none."""
    for line in reversed(logs.splitlines()):
        if line.startswith('{"artifacts"'):
            outcome: dict[str, Any] = json.loads(line)
            return outcome
    return {}


def describe(job: JobDetails) -> str:
    """Return one line with id, state, exit code, duration, root and error of a job."""
    parts = [f"{job.submission_id}: {job.status.value}"]
    if job.status.is_terminal():
        parts[0] += f", exit code {exit_code(job)}"
    if job.start_time:
        ended = (job.end_time or time.time() * 1000) / 1000
        parts[0] += f", {ended - job.start_time / 1000:.0f} s"
    if (job.metadata or {}).get("root"):
        parts.append(f"root {job.metadata['root']}")
    if job.status == JobStatus.FAILED and job.driver_exit_code is None and job.message:
        parts.append(" ".join(job.message.split()))
    return "; ".join(parts)


def runtime_env(package: JobPackage) -> dict[str, Any]:
    """Return the job's runtime environment; without variables, because the Job API shows them to every client."""
    pip = {"pip": {"packages": package.requirements, "pip_check": False}} if package.requirements else {}
    return {"config": {"setup_timeout_seconds": SETUP_SECONDS}, **pip}


class _JobOutput:
    """Number of characters already written; each new connection sends a job's output from the start."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write, self.characters = write, 0


async def _tail(client: JobSubmissionClient, job_id: str, output: _JobOutput) -> None:
    received = 0
    async for text in client.tail_job_logs(job_id):
        fresh = text[max(0, output.characters - received) :]
        received += len(text)
        if fresh:
            output.characters = received
            output.write(fresh)


def _wait(client: JobSubmissionClient, job_id: str) -> JobDetails:
    job = get_job(client, job_id)
    while not job.status.is_terminal():
        time.sleep(0.5)
        job = get_job(client, job_id)
    return job


def _find_latest(client: JobSubmissionClient, package: JobPackage) -> tuple[int, JobDetails | None]:
    """Return the number and the details of the latest job of this package; 0 and None if there is none."""
    pattern = re.compile(re.escape(name_job(package)) + r"(?:-(\d+))?")
    found = [(match, job) for job in list_jobs(client) if (match := pattern.fullmatch(str(job.submission_id)))]
    return max(((int(match[1] or 1), job) for match, job in found), key=lambda pair: pair[0], default=(0, None))


def _may_resubmit(job: JobDetails, again: bool) -> bool:
    return job.status in (JobStatus.FAILED, JobStatus.STOPPED) or (again and job.status == JobStatus.SUCCEEDED)


def _send(client: JobSubmissionClient, package: JobPackage, job_id: str) -> None:
    with tempfile.TemporaryDirectory(prefix="mint-ray-") as folder:
        for name, content in package.files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        client.submit_job(
            entrypoint=package.entrypoint,
            submission_id=job_id,
            runtime_env=runtime_env(package) | {"working_dir": folder},
            metadata={"root": package.root, "resources": package.resources},
        )
