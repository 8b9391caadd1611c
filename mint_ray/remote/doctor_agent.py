"""Node check of `mint-ray doctor`: collect versions, clock and storage access of every node as one JSON line.

It is sent to the head as a script and depends on Ray alone, because nodes may have another mint-ray or none.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

NODE_SECONDS = 120
"""Timeout per node; most of it is for starting a worker there."""
ROUND_TRIPS = 5


class NodeCheck:
    """Checks of one node, run by an actor on it."""

    def clock(self) -> float:
        """Return seconds since 1970."""
        return time.time()

    def versions(self) -> dict[str, str | None]:
        """Return the version of each package that must be equal on all nodes; None if it is not installed."""
        found: dict[str, str | None] = {"python": platform.python_version(), "ray": ray.__version__}
        try:
            found["mint-ray"] = importlib.metadata.version("mint-ray")
        except importlib.metadata.PackageNotFoundError:
            found["mint-ray"] = None
        return found

    def storage(self, root: str, marker: str | None) -> str | None:
        """Return what is wrong with `root` from this node; None if it is writable and contains the head's `marker`."""
        try:
            from mint_ray import storage

            storage.check_writable(root)
            if marker is not None and not storage.exists(marker):
                return f"{root}: a file written by the head is not visible; the nodes do not share this disk"
        except Exception as error:  # any error is a finding
            return _one_line(error)
        return None


def check_nodes(root: str | None) -> dict[str, Any]:
    """Return the results of every node of this cluster, and the node types that an autoscaler can add."""
    marker = _write_marker(root)
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        checks = [_start_check(node["NodeID"]) for node in nodes]
        results = [_run_check(check, root, marker) for check in checks]
    finally:
        _delete_marker(marker)
    return {
        "nodes": [
            {
                "address": node["NodeManagerAddress"],
                "head": "node:__internal_head__" in node["Resources"],
                "gpus": node["Resources"].get("GPU", 0),
                **result,
            }
            for node, result in zip(nodes, results, strict=True)
        ],
        "node_types": _node_types(),
    }


def _start_check(node_id: str) -> Any:
    # no CPU: heads often have none
    options = {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}
    return ray.remote(NodeCheck).options(**options).remote()


def _run_check(check: Any, root: str | None, marker: str | None) -> dict[str, Any]:
    try:
        result: dict[str, Any] = {"versions": ray.get(check.versions.remote(), timeout=NODE_SECONDS)}
        result["skew"], result["skew_error"] = _measure_skew(check)
        if root is not None:
            result["storage"] = ray.get(check.storage.remote(root, marker), timeout=NODE_SECONDS)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {_one_line(error)}"[:300]}
    return result


def _measure_skew(check: Any) -> tuple[float, float]:
    """Return by how many seconds the node's clock is ahead of this one's, and the error bound.

    The bound is half of the fastest round trip.
    """
    trips = []
    for _ in range(ROUND_TRIPS):
        sent = time.time()
        there = ray.get(check.clock.remote(), timeout=NODE_SECONDS)
        received = time.time()
        trips.append(((received - sent) / 2, there - (sent + received) / 2))
    error, skew = min(trips)
    return skew, error


def _node_types() -> list[dict[str, Any]] | str:
    """Return name, GPUs and maximum number of each node type of the autoscaler, or the error if they are unknown.

    The list is empty without an autoscaler.
    """
    try:
        config = _kuberay_config() if "KUBERNETES_SERVICE_HOST" in os.environ else _launcher_config()
        return [
            {
                "name": name,
                "gpus": kind["resources"].get("GPU", 0),
                "max_workers": min(kind.get("max_workers", config["max_workers"]), config["max_workers"]),
            }
            for name, kind in config.get("available_node_types", {}).items()
        ]
    except Exception as error:
        return f"{type(error).__name__}: {_one_line(error)}"


def _kuberay_config() -> dict[str, Any]:
    """Return the autoscaler config that Ray derives from the RayCluster of this pod."""
    from ray.autoscaler._private.kuberay.autoscaling_config import AutoscalingConfigProducer

    namespace = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace").read_text(encoding="utf-8")
    config: dict[str, Any] = AutoscalingConfigProducer(os.environ["RAY_CLUSTER_NAME"], namespace)()
    return config


def _launcher_config() -> dict[str, Any]:
    """Return the autoscaler config that the cluster launcher wrote on this node, the head."""
    address = ray.get_runtime_context().gcs_address
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        words: list[str] = []
        with contextlib.suppress(OSError):
            words = process.read_text("utf-8", errors="replace").split("\0")
        if f"--gcs-address={address}" not in words or not any(word.endswith("/monitor.py") for word in words):
            continue
        paths = [word.partition("=")[2] for word in words if word.startswith("--autoscaling-config=")]
        # without a config the monitor only reports
        config: dict[str, Any] = yaml.safe_load(Path(paths[0]).expanduser().read_text("utf-8")) if paths else {}
        return config
    raise LookupError("the head runs no autoscaler process")


def _write_marker(root: str | None) -> str | None:
    """Write a file into the root that the other nodes should see; None if the head cannot write there."""
    if root is None:
        return None
    # the head's own storage check reports the error
    with contextlib.suppress(Exception):
        from mint_ray import storage

        marker = storage.join(root, f".doctor-{uuid.uuid4().hex}")
        storage.write_bytes(marker, b"")
        return marker
    return None


def _delete_marker(marker: str | None) -> None:
    if marker is not None:
        with contextlib.suppress(Exception):
            from mint_ray import storage

            storage.delete_file(marker)


def _one_line(error: Exception) -> str:
    # not the function of mint_ray.config.loader: the node may not have mint-ray
    return " ".join(str(error).split()) or repr(error)


if __name__ == "__main__":
    ray.init(log_to_driver=False, logging_level="ERROR")
    print(json.dumps({"doctor_agent": check_nodes(sys.argv[1] if len(sys.argv) > 1 else None)}))  # noqa: T201
