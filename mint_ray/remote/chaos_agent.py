"""What `mint-ray chaos` runs on a test cluster: hits a machine that may be hit, and says in one JSON line what it did.

It is sent there as a script and stands on Ray alone, like `mint_ray.remote.doctor_agent`.
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
"""Of the machines that may be hit, with the value 1; given to `ray start --labels`."""
HAND_SECONDS = 120
"""In which a machine must have done what it was told; starting a worker on it is most of that."""
MISSED_SECONDS = 180
"""In which a cluster must have noticed that a machine is gone."""


class Hand:
    """Sits on the machine that is hit."""

    def kill_worker(self, pid: int) -> None:
        """SIGKILL to one of the machine's worker processes. Raises LookupError if `pid` is none any more."""
        # the parent of every worker is its machine's raylet
        if _parent(pid) != os.getppid() or pid == os.getpid():
            raise LookupError(f"process {pid} is no worker of this machine any more")
        os.kill(pid, signal.SIGKILL)

    def kill_machine(self) -> None:
        """SIGKILL to the raylet, whose workers end with it."""
        os.kill(os.getppid(), signal.SIGKILL)

    def cut(self, root: str, seconds: int, machines: list[str], dry_run: bool) -> list[str]:
        """Drop what this machine sends to the storage of `root`, for so long; the addresses that are cut.

        Raises RuntimeError if that cannot be done here, or would cut more than storage.
        """
        if shutil.which("ip") is None or not _may_set_routes():
            raise RuntimeError("storage is cut by routes that lead nowhere: that takes iproute2 and CAP_NET_ADMIN")
        host = _host(root)
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
        for address in sorted(found):
            if ipaddress.ip_address(address).is_loopback or address in machines:
                raise RuntimeError(f"{host} is {address}, a machine of the cluster: more than storage would be cut")
        if not dry_run:
            for address in found:
                subprocess.run(["ip", "route", "add", "blackhole", address], check=True)
            # by a process that nothing of Ray ends: the cut must not outlive a machine's worker
            back = "; ".join(f"ip route del blackhole {address}" for address in found)
            subprocess.run(["sh", "-c", f"setsid sh -c 'sleep {seconds}; {back}' >/dev/null 2>&1 &"], check=True)
        return sorted(found)


def strike(wish: dict[str, Any]) -> dict[str, Any]:
    """Do to the machine `wish["node_id"]` what `wish["what"]` says. Raises RuntimeError if it may not be done."""
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    node = nodes.get(wish["node_id"])
    if node is None:
        raise RuntimeError("the machine is gone")
    if node["Labels"].get(LABEL) != "1":
        raise RuntimeError(f"machine {node['NodeManagerAddress']} has no label {LABEL}=1")
    # without a processor of its own: those may all be held
    options = {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(wish["node_id"], soft=False)}
    hand = ray.remote(Hand).options(**options).remote()
    if wish["what"] == "kill-worker":
        ray.get(hand.kill_worker.remote(wish["pid"]), timeout=HAND_SECONDS)
        return {}
    if wish["what"] == "cut-storage":
        machines = [other["NodeManagerAddress"] for other in nodes.values()]
        cut = hand.cut.remote(wish["root"], wish["seconds"], machines, wish["dry_run"])
        return {"addresses": ray.get(cut, timeout=HAND_SECONDS)}
    if "node:__internal_head__" in node["Resources"]:
        raise RuntimeError("the head is never killed")
    started = time.monotonic()
    with contextlib.suppress(ray.exceptions.RayActorError):
        ray.get(hand.kill_machine.remote(), timeout=HAND_SECONDS)
    while any(other["NodeID"] == wish["node_id"] and other["Alive"] for other in ray.nodes()):
        if time.monotonic() - started > MISSED_SECONDS:
            raise RuntimeError(f"the machine is not missed after {MISSED_SECONDS} s")
        time.sleep(0.2)
    return {"missed_after": round(time.monotonic() - started, 1)}


def _parent(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
            # behind the name, which may hold brackets and spaces
            return int(stat.read().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _may_set_routes() -> bool:
    with open("/proc/self/status", encoding="utf-8") as status:
        effective = next(line.split()[1] for line in status if line.startswith("CapEff"))
    return bool(int(effective, 16) >> 12 & 1)  # CAP_NET_ADMIN


def _host(root: str) -> str:
    """Who serves the bucket, as this machine is told to reach it."""
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
        print(json.dumps({"hit": strike(json.loads(sys.argv[1]))}))  # noqa: T201
    except Exception as error:
        # what a machine raised comes with a traceback of Ray's; its last line says it
        said = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
        print(json.dumps({"hit": {"error": said[-1].strip()}}))  # noqa: T201
