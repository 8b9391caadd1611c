"""Run a spec on a cluster through Ray's Job API: submit, watch, stop."""

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

from mint_ray.config.loader import UserError
from mint_ray.remote.package import Parcel

SETUP_SECONDS = 600
"""After which a job whose requirements do not install has failed; without it Ray keeps it PENDING."""
SIGTERM = 15
LOOKS = 20
"""How often a cluster that does not answer is asked again while a job is followed, three seconds apart."""

TOKEN_ADVICE = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"  # noqa: S105

logger = logging.getLogger("mint_ray")


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job on the cluster, new or met there."""

    job_id: str
    new: bool
    same_resources: bool = True
    """Whether a job that was met asks for the machines that this spec asks for."""


def connect(address: str) -> JobSubmissionClient:
    """The Job API of the cluster whose dashboard is at `address`, http:// or https://.

    Token and certificates come from the environment, as for `ray job`: RAY_AUTH_MODE, RAY_AUTH_TOKEN or
    RAY_AUTH_TOKEN_PATH, REQUESTS_CA_BUNDLE. Raises UserError if nobody answers there or the token is refused.
    """
    if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).hostname:
        raise UserError(f"address {address!r}: expected http://host:8265 or https://host")
    # RAY_ADDRESS, which is for drivers, would win over the argument
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    for chatty in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        return JobSubmissionClient(address, verify=os.environ.get("REQUESTS_CA_BUNDLE") or True)
    except AuthenticationError as error:
        # the last line of Ray's page of advice is not what was wrong
        raise UserError(f"{address}: {str(error).splitlines()[0]}; {TOKEN_ADVICE}") from error
    except (OSError, requests.RequestException) as error:
        raise UserError(f"{address}: nobody answers: {' '.join(str(error).split())}") from error


def name_job(parcel: Parcel) -> str:
    """The submission id of a parcel when it is first sent; sent again after a failure it gets a number."""
    return f"mint-ray-{parcel.verb}-{parcel.recipe}"


def submit(client: JobSubmissionClient, parcel: Parcel, *, again: bool = False) -> Submitted:
    """Send a parcel, unless it is on the cluster already, waiting, running or succeeded; one that failed or was stopped
    is sent under the next number, and so is one that succeeded if it is to be run `again`.

    Raises RuntimeError if the cluster refuses it.
    """
    while True:
        number, met = _find(client, parcel)
        if met is not None and not _is_over(met, again):
            asked = (met.metadata or {}).get("resources")
            return Submitted(str(met.submission_id), new=False, same_resources=asked == parcel.resources)
        job_id = name_job(parcel) + (f"-{number + 1}" if number else "")
        try:
            _send(client, parcel, job_id)
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise
            continue  # somebody sent the same at the same moment
        return Submitted(job_id, new=True)


def find(client: JobSubmissionClient, job_id: str) -> JobDetails:
    """What the cluster knows of a job. Raises UserError if that is nothing."""
    try:
        return client.get_job_info(job_id)
    except RuntimeError as error:
        if "404" not in str(error):
            raise
        raise UserError(f"{job_id}: no such job at {client.get_address()}") from error


def list_jobs(client: JobSubmissionClient) -> list[JobDetails]:
    """The jobs that were submitted from here or elsewhere, oldest first."""
    return sorted((job for job in client.list_jobs() if job.submission_id), key=lambda job: job.start_time or 0)


def stop(client: JobSubmissionClient, job_id: str) -> JobDetails:
    """End a job, and wait until it has ended."""
    find(client, job_id)
    client.stop_job(job_id)
    return _wait(client, job_id)


def read_logs(client: JobSubmissionClient, job_id: str) -> str:
    """All that a job has said so far."""
    find(client, job_id)
    return str(client.get_job_logs(job_id))


def follow(client: JobSubmissionClient, job_id: str, say: Callable[[str], None]) -> JobDetails:
    """`say` what the job says until it has ended; a connection that is cut meanwhile is made again.

    Raises ConnectionError when the cluster has not answered for a minute.
    """
    find(client, job_id)
    told = _Told(say)
    looks = 0
    while looks < LOOKS:
        before = told.characters
        try:
            asyncio.run(_tail(client, job_id, told))
            return _wait(client, job_id)
        except (OSError, RuntimeError, requests.RequestException, aiohttp.ClientError) as error:
            logger.warning("%s: lost sight of it (%s), looking again", job_id, " ".join(str(error).split()))
        looks = 1 if told.characters > before else looks + 1
        time.sleep(3)
    raise ConnectionError(f"{job_id}: {client.get_address()} does not answer any more; the job may go on")


def run_script(
    client: JobSubmissionClient, purpose: str, module: str, arguments: Sequence[str], seconds: float
) -> dict[str, Any]:
    """What a module of ours says last, in the line `{"MODULE": ...}`, when it is run on the head as a script.

    It is sent as a job of its own, `mint-ray-PURPOSE-...`, of which nothing is left. Raises RuntimeError if it fails
    there, TimeoutError if it does not end in so many seconds.
    """
    job_id = f"mint-ray-{purpose}-{uuid.uuid4().hex[:12]}"
    with tempfile.TemporaryDirectory(prefix="mint-ray-") as folder:
        (Path(folder) / f"{module}.py").write_bytes(files("mint_ray").joinpath(f"{module}.py").read_bytes())
        client.submit_job(
            entrypoint=shlex.join(["python", f"{module}.py", *arguments]),
            submission_id=job_id,
            runtime_env={"working_dir": folder, "config": {"setup_timeout_seconds": int(seconds)}},
        )
    until = time.monotonic() + seconds
    while not (job := client.get_job_info(job_id)).status.is_terminal():
        if time.monotonic() > until:
            client.stop_job(job_id)
            raise TimeoutError(f"did not end in {seconds:g} s; {job.message}")
        time.sleep(0.5)
    logs = client.get_job_logs(job_id)
    with contextlib.suppress(RuntimeError):
        client.delete_job(job_id)
    for line in reversed(logs.splitlines()):
        if line.startswith(f'{{"{module}"'):
            told: dict[str, Any] = json.loads(line)[module]
            return told
    said = [line for line in logs.splitlines() if line.strip()]
    raise RuntimeError(f"failed on the head: {said[-1] if said else job.message}")


def exit_code(job: JobDetails) -> int:
    """That of the job's own command; 128 and the signal that ended it, as a shell has it."""
    if job.status == JobStatus.SUCCEEDED:
        return 0
    if job.driver_exit_code is not None:
        code = int(job.driver_exit_code)
        return code if code >= 0 else 128 - code
    return 128 + SIGTERM if job.status == JobStatus.STOPPED else 1


def read_outcome(logs: str) -> dict[str, Any]:
    """The JSON object that a run says last: its artifacts, metrics and seconds; empty if it never came so far."""
    for line in reversed(logs.splitlines()):
        if line.startswith('{"artifacts"'):
            outcome: dict[str, Any] = json.loads(line)
            return outcome
    return {}


def describe(job: JobDetails) -> str:
    """One line: name, state, exit code where it has ended, where it writes, and what is wrong."""
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


class _Told:
    """How much of a job's log has been said: a new connection begins at its beginning."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.characters = say, 0


async def _tail(client: JobSubmissionClient, job_id: str, told: _Told) -> None:
    seen = 0
    async for text in client.tail_job_logs(job_id):
        fresh = text[max(0, told.characters - seen) :]
        seen += len(text)
        if fresh:
            told.characters = seen
            told.say(fresh)


def _wait(client: JobSubmissionClient, job_id: str) -> JobDetails:
    job = find(client, job_id)
    while not job.status.is_terminal():
        time.sleep(0.5)
        job = find(client, job_id)
    return job


def _find(client: JobSubmissionClient, parcel: Parcel) -> tuple[int, JobDetails | None]:
    """The last of the jobs made of this parcel, and its number."""
    pattern = re.compile(re.escape(name_job(parcel)) + r"(?:-(\d+))?")
    found = [(match, job) for job in list_jobs(client) if (match := pattern.fullmatch(str(job.submission_id)))]
    return max(((int(match[1] or 1), job) for match, job in found), key=lambda pair: pair[0], default=(0, None))


def _is_over(job: JobDetails, again: bool) -> bool:
    return job.status in (JobStatus.FAILED, JobStatus.STOPPED) or (again and job.status == JobStatus.SUCCEEDED)


def _send(client: JobSubmissionClient, parcel: Parcel, job_id: str) -> None:
    with tempfile.TemporaryDirectory(prefix="mint-ray-") as folder:
        for name, content in parcel.files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        client.submit_job(
            entrypoint=parcel.entrypoint,
            submission_id=job_id,
            runtime_env=runtime_env(parcel) | {"working_dir": folder},
            metadata={"root": parcel.root, "resources": parcel.resources},
        )


def runtime_env(parcel: Parcel) -> dict[str, Any]:
    """What Ray prepares for the job beside its working directory; never a variable, for the Job API repeats them."""
    packages = {"pip": {"packages": parcel.requirements, "pip_check": False}} if parcel.requirements else {}
    return {"config": {"setup_timeout_seconds": SETUP_SECONDS}, **packages}
