"""Fault injection of `mint-ray chaos`: inject one fault into a labeled node and print the result as one JSON line.

It is sent to the head as a script and depends on Ray alone, like `mint_ray.remote.doctor_agent`.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

LABEL = "mint-ray-chaos"
"""Label, with the value 1, of nodes that allow fault injection; set by `ray start --labels`."""
ACTOR_SECONDS = 120
"""Timeout of a call to the actor on the node; most of it is for starting a worker there."""
DETECTION_SECONDS = 180
"""Timeout for the cluster to detect a node failure."""
CAP_NET_ADMIN = 12
"""Bit of the capability to change routes."""


class FaultInjector:
    """Faults of one node, injected by an actor on it."""

    def kill_worker(self, pid: int) -> None:
        """Send SIGKILL to a worker process of this node. Raises LookupError if `pid` is not one of them any more."""
        # the parent of every worker is its node's raylet
        if _parent(pid) != os.getppid() or pid == os.getpid():
            raise LookupError(f"process {pid} is not a worker of this node any more")
        os.kill(pid, signal.SIGKILL)

    def kill_node(self) -> None:
        """Send SIGKILL to this node's raylet; its workers exit with it."""
        os.kill(os.getppid(), signal.SIGKILL)

    def cut_storage(self, root: str, seconds: int, nodes: list[str], dry_run: bool) -> list[str]:
        """Drop this node's traffic to the storage of `root` for `seconds`, and return the blocked addresses.

        Args:
            root: s3:// or gs:// address.
            seconds: Duration.
            nodes: Addresses of the cluster's nodes, which must remain reachable.
            dry_run: Only resolve the addresses.

        Raises:
            RuntimeError: The node cannot change routes, or more than storage would be blocked.
        """
        if shutil.which("ip") is None or not _may_set_routes():
            raise RuntimeError("storage is cut off by blackhole routes, which require iproute2 and CAP_NET_ADMIN")
        host = _storage_host(root)
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
        for address in sorted(found):
            if ipaddress.ip_address(address).is_loopback or address in nodes:
                raise RuntimeError(f"{host} is {address}, a node of the cluster: more than storage would be cut off")
        if not dry_run:
            for address in found:
                subprocess.run(["ip", "route", "add", "blackhole", address], check=True)
            # in a detached process, so that the routes are removed even if Ray kills this worker
            undo = "; ".join(f"ip route del blackhole {address}" for address in found)
            subprocess.run(["sh", "-c", f"setsid sh -c 'sleep {seconds}; {undo}' >/dev/null 2>&1 &"], check=True)
        return sorted(found)


def inject_fault(request: dict[str, Any]) -> dict[str, Any]:
    """Inject the fault `request["fault"]` into the node `request["node_id"]`. Raises RuntimeError if it is refused."""
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    node = nodes.get(request["node_id"])
    if node is None:
        raise RuntimeError("the node is not alive any more")
    if node["Labels"].get(LABEL) != "1":
        raise RuntimeError(f"node {node['NodeManagerAddress']} does not have the label {LABEL}=1")
    # no CPU: all of them may be allocated
    options = {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(request["node_id"], soft=False)}
    injector = ray.remote(FaultInjector).options(**options).remote()
    if request["fault"] == "kill-worker":
        ray.get(injector.kill_worker.remote(request["pid"]), timeout=ACTOR_SECONDS)
        return {}
    if request["fault"] == "cut-storage":
        addresses = [other["NodeManagerAddress"] for other in nodes.values()]
        cut = injector.cut_storage.remote(request["root"], request["seconds"], addresses, request["dry_run"])
        return {"addresses": ray.get(cut, timeout=ACTOR_SECONDS)}
    if "node:__internal_head__" in node["Resources"]:
        raise RuntimeError("the head is never killed")
    started = time.monotonic()
    with contextlib.suppress(ray.exceptions.RayActorError):
        ray.get(injector.kill_node.remote(), timeout=ACTOR_SECONDS)
    while any(other["NodeID"] == request["node_id"] and other["Alive"] for other in ray.nodes()):
        if time.monotonic() - started > DETECTION_SECONDS:
            raise RuntimeError(f"the cluster did not detect the node failure within {DETECTION_SECONDS} s")
        time.sleep(0.2)
    return {"detected_after": round(time.monotonic() - started, 1)}


def _parent(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
            # the fields follow the name, which may contain brackets and spaces
            return int(stat.read().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _may_set_routes() -> bool:
    with open("/proc/self/status", encoding="utf-8") as status:
        effective = next(line.split()[1] for line in status if line.startswith("CapEff"))
    return bool(int(effective, 16) >> CAP_NET_ADMIN & 1)


def _storage_host(root: str) -> str:
    """Return the host that serves the bucket, according to this node's environment."""
    bucket = urlsplit(root).netloc
    if root.startswith("gs://"):
        return "storage.googleapis.com"
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        return urlsplit(endpoint).hostname or endpoint
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return f"{bucket}.s3.{region}.amazonaws.com"


if __name__ == "__main__":
    ray.init(log_to_driver=False, logging_level="ERROR")
    try:
        print(json.dumps({"chaos_agent": inject_fault(json.loads(sys.argv[1]))}))  # noqa: T201
    except Exception as error:
        # an actor's error contains Ray's traceback; its last line is the message
        lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
        print(json.dumps({"chaos_agent": {"error": lines[-1].strip()}}))  # noqa: T201
