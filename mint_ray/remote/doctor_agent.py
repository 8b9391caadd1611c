"""What `mint-ray doctor` runs on a cluster: asks every machine for its versions, clock and storage, in one JSON line.

It is sent there as a script, to machines that may have another mint-ray or none: it stands on Ray alone.
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
"""In which a machine must have answered; starting a worker on it is most of that."""
ROUND_TRIPS = 5


class Witness:
    """Sits on one machine and answers for it."""

    def clock(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def versions(self) -> dict[str, str | None]:
        """Of what must be the same everywhere; None is not installed."""
        found: dict[str, str | None] = {"python": platform.python_version(), "ray": ray.__version__}
        try:
            found["mint-ray"] = importlib.metadata.version("mint-ray")
        except importlib.metadata.PackageNotFoundError:
            found["mint-ray"] = None
        return found

    def storage(self, root: str, marker: str | None) -> str | None:
        """What is wrong with `root` as seen from here; None if it can be written and `marker`, left by another machine,
        is there."""
        try:
            from mint_ray import storage

            storage.check_writable(root)
            if marker is not None and not storage.exists(marker):
                return f"{root}: a file that the head wrote is not seen; every machine has a disk of its own there"
        except Exception as error:  # whatever it is, it is what the doctor was called for
            return " ".join(f"{error}".split()) or repr(error)
        return None


def examine(root: str | None) -> dict[str, Any]:
    """What every machine of this cluster answers, and which machines an autoscaler could add."""
    marker = _leave_marker(root)
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        witnesses = [_witness(node["NodeID"]) for node in nodes]
        answers = [_ask(witness, root, marker) for witness in witnesses]
    finally:
        _remove_marker(marker)
    return {
        "nodes": [
            {
                "address": node["NodeManagerAddress"],
                "head": "node:__internal_head__" in node["Resources"],
                "gpus": node["Resources"].get("GPU", 0),
                **answer,
            }
            for node, answer in zip(nodes, answers, strict=True)
        ],
        "groups": _groups(),
    }


def _witness(node_id: str) -> Any:
    # without a processor of its own: heads have none to give
    options = {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}
    return ray.remote(Witness).options(**options).remote()


def _ask(witness: Any, root: str | None, marker: str | None) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = {"versions": ray.get(witness.versions.remote(), timeout=NODE_SECONDS)}
        answer["skew"], answer["skew_error"] = _skew(witness)
        if root is not None:
            answer["storage"] = ray.get(witness.storage.remote(root, marker), timeout=NODE_SECONDS)
    except Exception as error:
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    return answer


def _skew(witness: Any) -> tuple[float, float]:
    """Seconds by which the machine's clock is ahead of this one's, and how far that can be off: the quickest round
    trip's half."""
    trips = []
    for _ in range(ROUND_TRIPS):
        sent = time.time()
        there = ray.get(witness.clock.remote(), timeout=NODE_SECONDS)
        received = time.time()
        trips.append(((received - sent) / 2, there - (sent + received) / 2))
    error, skew = min(trips)
    return skew, error


def _groups() -> list[dict[str, Any]] | str:
    """Kinds of machine that an autoscaler can have, with the GPUs of one and the most of them; none without an
    autoscaler; a sentence where that cannot be told."""
    try:
        config = _config_of_kuberay() if "KUBERNETES_SERVICE_HOST" in os.environ else _config_of_launcher()
        return [
            {
                "name": name,
                "gpus": kind["resources"].get("GPU", 0),
                "most": min(kind.get("max_workers", config["max_workers"]), config["max_workers"]),
            }
            for name, kind in config.get("available_node_types", {}).items()
        ]
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())


def _config_of_kuberay() -> dict[str, Any]:
    """What Ray's autoscaler makes of the RayCluster that this pod belongs to."""
    from ray.autoscaler._private.kuberay.autoscaling_config import AutoscalingConfigProducer

    namespace = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace").read_text(encoding="utf-8")
    config: dict[str, Any] = AutoscalingConfigProducer(os.environ["RAY_CLUSTER_NAME"], namespace)()
    return config


def _config_of_launcher() -> dict[str, Any]:
    """What the cluster launcher left for the autoscaler on this machine, the head."""
    address = ray.get_runtime_context().gcs_address
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        words: list[str] = []
        with contextlib.suppress(OSError):
            words = process.read_text("utf-8", errors="replace").split("\0")
        if f"--gcs-address={address}" not in words or not any(word.endswith("/monitor.py") for word in words):
            continue
        paths = [word.partition("=")[2] for word in words if word.startswith("--autoscaling-config=")]
        # without a config, the monitor only reports
        config: dict[str, Any] = yaml.safe_load(Path(paths[0]).expanduser().read_text("utf-8")) if paths else {}
        return config
    raise LookupError("no autoscaler is seen from the head")


def _leave_marker(root: str | None) -> str | None:
    """A file in the root that the other machines should see; None where this one cannot write, which its own answer
    says."""
    if root is None:
        return None
    with contextlib.suppress(Exception):
        from mint_ray import storage

        marker = storage.join(root, f".doctor-{uuid.uuid4().hex}")
        storage.write_bytes(marker, b"")
        return marker
    return None


def _remove_marker(marker: str | None) -> None:
    if marker is not None:
        with contextlib.suppress(Exception):
            from mint_ray import storage

            storage.delete_file(marker)


if __name__ == "__main__":
    ray.init(log_to_driver=False, logging_level="ERROR")
    print(json.dumps({"probe": examine(sys.argv[1] if len(sys.argv) > 1 else None)}))  # noqa: T201
