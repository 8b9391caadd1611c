"""Fault injection on a test cluster, to verify that runs recover."""

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

Fault = Literal["kill-worker", "kill-node", "cut-storage"]

INJECT_SECONDS = 400
"""Timeout for injecting a fault."""
MAX_LISTED = 10_000
"""Maximum number of nodes, actors or tasks per request to Ray's State API."""
OUR_COMMAND = re.compile(r"\bmint[-_]ray\b")
AGENT_JOBS = ("mint-ray-doctor-", "mint-ray-chaos-")
"""Prefixes of the submission ids of agents, which are never targets."""


@dataclass(frozen=True, slots=True, order=True)
class Target:
    """Node, or worker process on a node, that a fault is injected into."""

    node_id: str
    address: str
    pid: int | None = None
    name: str = ""
    """Name of the actor class or task that the process runs."""
    job: str = ""

    def __str__(self) -> str:
        node = f"node {self.address} ({self.node_id[:8]})"
        return node if self.pid is None else f"process {self.pid}, {self.name} of {self.job}, on {node}"


def select_target(client: JobSubmissionClient, fault: Fault, rng: random.Random) -> Target:
    """Return a random target on the nodes with the label `mint-ray-chaos=1`.

    Raises:
        UserError: No node has the label, or those nodes have no target for this fault.
    """
    address = client.get_address()
    alive = [node for node in state.list_nodes(address, limit=MAX_LISTED, detail=True) if node.state == "ALIVE"]
    labeled = {node.node_id: node for node in alive if (node.labels or {}).get(LABEL) == "1"}
    if not labeled:
        raise UserError(
            f"{address}: no node allows fault injection; on a test cluster, start nodes with --labels={LABEL}=1, "
            f"or wait until one is up"
        )
    if fault == "kill-worker":
        workers = [
            Target(node_id, labeled[node_id].node_ip, pid, name, job)
            for node_id, pid, name, job in _busy_workers(client, address)
            if node_id in labeled
        ]
        return _choose(workers, "process with CPUs or GPUs of a running mint-ray job", rng, address)
    nodes = [Target(node.node_id, node.node_ip) for node in labeled.values() if not node.is_head_node]
    return _choose(nodes, "node other than the head", rng, address)


def inject_fault(
    client: JobSubmissionClient,
    fault: Fault,
    target: Target,
    *,
    root: str = "",
    seconds: int = 0,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Inject a fault into the target.

    Args:
        client: Connection to the cluster.
        fault: Kind of fault.
        target: Return value of `select_target`.
        root: Storage that `cut-storage` blocks.
        seconds: Duration of `cut-storage`.
        dry_run: For `cut-storage`, only resolve the addresses that would be blocked.

    Returns:
        `detected_after` (seconds) for `kill-node`, `addresses` (blocked ones) for `cut-storage`.

    Raises:
        UserError: The node rejects the fault.
    """
    request = {"fault": fault, "node_id": target.node_id, "pid": target.pid}
    request |= {"root": root, "seconds": seconds, "dry_run": dry_run}
    result = jobs.run_agent(client, "chaos_agent", [json.dumps(request)], purpose="chaos", timeout=INJECT_SECONDS)
    if "error" in result:
        raise UserError(f"{fault}: {target}: {result['error']}")
    return result


def check_root(root: str | None) -> str:
    """Return `root`; raise UserError unless a node reaches its storage through the network."""
    if root is None or not root.startswith(("s3://", "gs://")):
        raise UserError(f"--root {root or ''}: cut-storage requires s3:// or gs://; a local disk cannot be cut off")
    return root


def _busy_workers(client: JobSubmissionClient, address: str) -> list[tuple[str, int, str, str]]:
    """Return node, process, name and job of every worker with CPUs or GPUs of a running mint-ray job."""
    found: list[tuple[str, int, str, str]] = []
    for job in client.list_jobs():
        if job.status != JobStatus.RUNNING or not job.job_id or not _is_ours(job):
            continue
        job_name = job.submission_id or job.job_id
        # an actor's tasks are covered by the actor
        filters: Any = [("job_id", "=", job.job_id), ("state", "=", "ALIVE")]
        actors = state.list_actors(address, filters=filters, limit=MAX_LISTED, detail=True)
        filters = [("job_id", "=", job.job_id), ("state", "=", "RUNNING"), ("type", "=", "NORMAL_TASK")]
        tasks = state.list_tasks(address, filters=filters, limit=MAX_LISTED, detail=True)
        workers = [(actor.node_id, actor.pid, actor.class_name, actor.required_resources) for actor in actors]
        workers += [(task.node_id, task.worker_pid, task.name, task.required_resources) for task in tasks]
        found += [(node_id, pid, name, job_name) for node_id, pid, name, used in workers if pid and _uses_compute(used)]
    return found


def _is_ours(job: JobDetails) -> bool:
    if str(job.submission_id).startswith(AGENT_JOBS):
        return False
    return OUR_COMMAND.search(job.entrypoint or "") is not None


def _uses_compute(resources: dict[str, float] | None) -> bool:
    """Return True if CPUs or GPUs are allocated, also through a placement group; others only coordinate."""
    return any(key.split("_")[0] in ("CPU", "GPU") for key, amount in (resources or {}).items() if amount)


def _choose(targets: Sequence[Target], description: str, rng: random.Random, address: str) -> Target:
    if not targets:
        raise UserError(f"{address}: no {description} on the nodes that allow fault injection")
    return rng.choice(sorted(targets))
