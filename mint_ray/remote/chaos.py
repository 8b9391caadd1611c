"""Hit a test cluster on purpose, so that recovery is seen before money depends on it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.util import state

from mint_ray.config.loader import UserError
from mint_ray.remote import jobs
from mint_ray.remote.chaos_agent import LABEL

What = Literal["kill-worker", "kill-node", "cut-storage"]

SECONDS = 400
"""In which a hit must have been made."""
MOST = 10_000
"""Machines, actors or tasks that are asked for at a time."""
OURS = re.compile(r"\bmint[-_]ray\b")
SENT_TO_LOOK = ("mint-ray-doctor-", "mint-ray-chaos-")


@dataclass(frozen=True, slots=True, order=True)
class Target:
    """What is hit: a machine, or one process on it."""

    node_id: str
    address: str
    pid: int | None = None
    name: str = ""
    """Of the actor or task that the process is at."""
    job: str = ""

    def __str__(self) -> str:
        machine = f"machine {self.address} ({self.node_id[:8]})"
        return machine if self.pid is None else f"process {self.pid}, {self.name} of {self.job}, on {machine}"


def aim(client: JobSubmissionClient, what: What, draws: random.Random) -> Target:
    """What would be hit: drawn from what machines with the label `mint-ray-chaos=1` allow.

    Raises UserError if no machine has the label, or there is nothing on them to hit.
    """
    address = client.get_address()
    up = [node for node in state.list_nodes(address, limit=MOST, detail=True) if node.state == "ALIVE"]
    allowed = {node.node_id: node for node in up if (node.labels or {}).get(LABEL) == "1"}
    if not allowed:
        raise UserError(
            f"{address}: no machine says that it may be hit; on a test cluster, start machines with "
            f"--labels={LABEL}=1, or wait until one is up"
        )
    if what == "kill-worker":
        workers = [
            Target(node_id, allowed[node_id].node_ip, pid, name, job)
            for node_id, pid, name, job in _working(client, address)
            if node_id in allowed
        ]
        return _draw(workers, "process that holds a processor or GPU for a running mint-ray job", draws, address)
    machines = [Target(node.node_id, node.node_ip) for node in allowed.values() if not node.is_head_node]
    return _draw(machines, "machine but the head", draws, address)


def strike(
    client: JobSubmissionClient, what: What, target: Target, *, root: str = "", seconds: int = 0, dry_run: bool = False
) -> dict[str, Any]:
    """Hit the target: `missed_after` seconds of a machine, `addresses` of storage that are cut for `seconds`.

    Raises UserError if the machine refuses. A dry run of `cut-storage` asks the machine what it would cut.
    """
    wish = {"what": what, "node_id": target.node_id, "pid": target.pid}
    wish |= {"root": root, "seconds": seconds, "dry_run": dry_run}
    told = jobs.run_script(client, "chaos", "hit", [json.dumps(wish)], SECONDS)
    if "error" in told:
        raise UserError(f"{what}: {target}: {told['error']}")
    return told


def check_root(root: str | None) -> str:
    """Raise UserError unless the storage of `root` is one that a machine reaches through its network."""
    if root is None or not root.startswith(("s3://", "gs://")):
        raise UserError(f"--root {root or ''}: cut-storage takes s3:// or gs://; a disk cannot be cut from a machine")
    return root


def _working(client: JobSubmissionClient, address: str) -> list[tuple[str, int, str, str]]:
    """Node, process, name and job of every worker that holds something for a running job of ours."""
    found: list[tuple[str, int, str, str]] = []
    for job in client.list_jobs():
        if job.status != JobStatus.RUNNING or not job.job_id or not _is_ours(job):
            continue
        name = job.submission_id or job.job_id
        # what an actor is at is told by the actor
        asked: Any = [("job_id", "=", job.job_id), ("state", "=", "ALIVE")]
        actors = state.list_actors(address, filters=asked, limit=MOST, detail=True)
        asked = [("job_id", "=", job.job_id), ("state", "=", "RUNNING"), ("type", "=", "NORMAL_TASK")]
        tasks = state.list_tasks(address, filters=asked, limit=MOST, detail=True)
        held = [(actor.node_id, actor.pid, actor.class_name, actor.required_resources) for actor in actors]
        held += [(task.node_id, task.worker_pid, task.name, task.required_resources) for task in tasks]
        found += [(node_id, pid, at, name) for node_id, pid, at, resources in held if pid and _holds(resources)]
    return found


def _is_ours(job: JobDetails) -> bool:
    if str(job.submission_id).startswith(SENT_TO_LOOK):
        return False
    return OURS.search(job.entrypoint or "") is not None


def _holds(resources: dict[str, float] | None) -> bool:
    """Whether processors or GPUs, and be it of a placement group: what holds none only directs others."""
    return any(key.split("_")[0] in ("CPU", "GPU") for key, amount in (resources or {}).items() if amount)


def _draw(targets: Sequence[Target], named: str, draws: random.Random, address: str) -> Target:
    if not targets:
        raise UserError(f"{address}: there is no {named} on the machines that may be hit")
    return draws.choice(sorted(targets))
