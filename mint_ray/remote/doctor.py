"""Diagnosis of a cluster before it costs money: access, versions, clocks, storage, GPUs."""

from __future__ import annotations

import email.utils
import importlib.metadata
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import ray
import requests

from mint_ray import storage
from mint_ray.config.loader import UserError, one_line
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.remote import jobs

MAX_SKEW_SECONDS = 5.0
"""Maximum clock difference: above it logs cannot be ordered; from 900 s on S3 rejects requests."""
NODE_CHECK_SECONDS = 180
"""Timeout for the node check, over all nodes."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check."""

    check: str
    status: Literal["ok", "fail", "unknown"]
    message: str

    def __str__(self) -> str:
        return f"{self.status:<8}{self.check}: {self.message}"


@dataclass(frozen=True, slots=True)
class GpuDemand:
    """GPUs that a stage requests."""

    stage: str
    workers: int
    gpus: float
    """GPUs per worker."""

    def __str__(self) -> str:
        return f"{self.stage} requests {self.workers} x {self.gpus:g}"


def diagnose(address: str, config: PipelineConfig | None) -> Iterator[Finding]:
    """Check the cluster whose dashboard is at `address`, and what `config` needs of it; yield each finding at once.

    A script runs on every node for a few seconds; the check starts no nodes.
    """
    dashboard, clock = _check_dashboard(address)
    yield dashboard
    if clock is None:
        return
    try:
        client = jobs.connect(address)
    except (UserError, RuntimeError) as error:
        yield Finding("token", "fail", str(error))
        return
    yield from _check_transport(address)
    yield clock
    try:
        arguments = [storage.absolute(config.root)] if config else []
        report = jobs.run_agent(client, "doctor_agent", arguments, purpose="doctor", timeout=NODE_CHECK_SECONDS)
    except (RuntimeError, TimeoutError) as error:
        yield Finding("node check", "fail", str(error))
        return
    yield from check_report(report, local_versions(), config)


def check_report(report: dict[str, Any], local: dict[str, str], config: PipelineConfig | None) -> Iterator[Finding]:
    """Yield the findings from a node check's report.

    Args:
        report: Return value of `mint_ray.remote.doctor_agent.check_nodes`.
        local: Versions on this machine, by package.
        config: Config of the run that is planned; None skips storage and GPUs.
    """
    nodes = [node for node in report["nodes"] if "error" not in node]
    for node in report["nodes"]:
        if "error" in node:
            yield Finding("nodes", "fail", f"{_name(node)} does not respond: {node['error']}")
    yield from _check_versions(nodes, local)
    yield from _check_clocks(nodes)
    if config is not None:
        yield from _check_storage(nodes, config.root)
        yield _check_gpus(report["nodes"], report["node_types"], gpu_demands(config))


def local_versions() -> dict[str, str]:
    """Return the versions on this machine, by package."""
    return {
        "python": platform.python_version(),
        "ray": ray.__version__,
        "mint-ray": importlib.metadata.version("mint-ray"),
    }


def gpu_demands(config: PipelineConfig) -> list[GpuDemand]:
    """Return the GPU demand of each stage that needs GPUs, with its minimum number of workers."""
    score, train, evaluate = config.score.resources, config.train.resources, config.evaluate.resources
    min_workers = train.num_workers if isinstance(train.num_workers, int) else train.num_workers[0]
    demands = [
        GpuDemand("score", score.actors, score.gpus_per_actor),
        GpuDemand("build_vlm", 1, config.build_vlm.resources.gpus if config.build_vlm else 0),
        GpuDemand("train", min_workers, train.gpus_per_worker),
        GpuDemand("evaluate", evaluate.actors, evaluate.gpus_per_actor),
    ]
    return [demand for demand in demands if demand.gpus]


def _check_dashboard(address: str) -> tuple[Finding, Finding | None]:
    """Check that the dashboard rejects a request without a token, and its clock; None if it does not respond."""
    before = time.time()
    try:
        response = requests.get(f"{address.rstrip('/')}/api/jobs/", timeout=30, allow_redirects=False)
    except requests.RequestException as error:
        return Finding("dashboard", "fail", f"{address}: no response: {one_line(error)}"), None
    clock = check_date(response.headers.get("Date"), before, time.time())
    if response.status_code in (401, 403) or response.is_redirect:
        return Finding("dashboard", "ok", f"requires a token (status {response.status_code})"), clock
    if response.ok:
        message = "open: anyone who reaches it can run commands on the cluster; start it with RAY_AUTH_MODE=token"
        return Finding("dashboard", "fail", message), clock
    return Finding("dashboard", "unknown", f"status {response.status_code} without a token"), clock


def _check_transport(address: str) -> Iterator[Finding]:
    parts = urlsplit(address)
    if parts.scheme == "http" and parts.hostname not in LOOPBACK:
        message = f"the token is sent to {parts.hostname} unencrypted; forward the port, or use a TLS proxy"
        yield Finding("transport", "unknown", message)


def check_date(date: str | None, before: float, after: float) -> Finding:
    """Compare the head's clock with ours.

    Args:
        date: `Date` header of the head's response, in whole seconds.
        before: Our clock before the request, in seconds since 1970.
        after: Our clock after the response.
    """
    if date is None:
        return Finding("clocks", "unknown", "the head's response has no Date header")
    head = email.utils.parsedate_to_datetime(date).timestamp()
    ahead = head - after if head > after else min(head + 1 - before, 0)
    if abs(ahead) > MAX_SKEW_SECONDS:
        return Finding("clocks", "fail", f"the head's clock is {ahead:+.0f} s from this machine's")
    return Finding("clocks", "ok", "the head's clock agrees with this machine's")


def _check_versions(nodes: list[dict[str, Any]], local: dict[str, str]) -> Iterator[Finding]:
    differs = False
    for package, ours in local.items():
        for node in nodes:
            theirs = node["versions"][package]
            if theirs is None:
                yield Finding("versions", "fail", f"{_name(node)} does not have {package}")
            elif _comparable(package, theirs) != _comparable(package, ours):
                yield Finding("versions", "fail", f"{_name(node)} has {package} {theirs}, this machine {ours}")
            else:
                continue
            differs = True
    if nodes and not differs:
        listed = ", ".join(f"{package} {version}" for package, version in local.items())
        yield Finding("versions", "ok", f"{listed} here and on {_count(nodes)}")


def _comparable(package: str, version: str) -> str:
    """Return the part of a version that must be equal; micro releases of Python are compatible."""
    return ".".join(version.split(".")[:2]) if package == "python" else version


def _check_clocks(nodes: list[dict[str, Any]]) -> Iterator[Finding]:
    for node in nodes:
        if abs(node["skew"]) - node["skew_error"] > MAX_SKEW_SECONDS:
            yield Finding("clocks", "fail", f"the clock of {_name(node)} is {node['skew']:+.1f} s from the head's")


def _check_storage(nodes: list[dict[str, Any]], root: str) -> Iterator[Finding]:
    # a node without mint-ray cannot check storage
    checked = [node for node in nodes if node["versions"]["mint-ray"] is not None]
    failed = [node for node in checked if node["storage"]]
    for node in failed:
        yield Finding("storage", "fail", f"from {_name(node)}: {node['storage']}")
    if not [node for node in checked if not node["head"]]:
        reason = "only the head is up" if checked else "no node with mint-ray is up"
        yield Finding("storage", "unknown", f"{root} was not checked from a worker: {reason}")
    elif not failed:
        yield Finding("storage", "ok", f"{root} is writable from {_count(checked)}")


def _check_gpus(
    nodes: list[dict[str, Any]], node_types: list[dict[str, Any]] | str, demands: list[GpuDemand]
) -> Finding:
    """Check that each stage's GPUs are up or can be added; zero GPUs are fine on a cluster that is scaled to zero."""
    if not demands:
        return Finding("gpus", "ok", "the spec requests none")
    up = [node["gpus"] for node in nodes]
    missing = [demand for demand in demands if _count_workers(demand, up) < demand.workers]
    if not missing:
        return Finding("gpus", "ok", f"{_count_gpus(up)} up, enough for every stage")
    if isinstance(node_types, str):
        message = f"{missing[0]}; {_count_gpus(up)} up, and the autoscaler's limits are unknown: {node_types}"
        return Finding("gpus", "unknown", message)
    limit = [kind["gpus"] for kind in node_types for _ in range(kind["max_workers"])]
    impossible = [demand for demand in missing if _count_workers(demand, limit) < demand.workers]
    if not impossible:
        message = f"{_count_gpus(up)} up; the autoscaler can scale to {_count_gpus(limit)}, enough for every stage"
        return Finding("gpus", "ok", message)
    limits = f"the autoscaler can scale to at most {_count_gpus(limit)}" if node_types else "no autoscaler adds any"
    return Finding("gpus", "fail", f"{impossible[0]}; {_count_gpus(up)} up, and {limits}")


def _count_workers(demand: GpuDemand, nodes: list[float]) -> int:
    """Return how many of the stage's workers fit on nodes with these numbers of GPUs; a worker uses one node."""
    return sum(int(gpus / demand.gpus + 1e-9) for gpus in nodes)


def _count_gpus(nodes: list[float]) -> str:
    gpus = [number for number in nodes if number]
    return f"{sum(gpus):g} GPU{'s' if sum(gpus) != 1 else ''}" + (f" on {_count(gpus)}" if gpus else "")


def _count(nodes: list[Any]) -> str:
    return f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}"


def _name(node: dict[str, Any]) -> str:
    return f"the head ({node['address']})" if node["head"] else f"node {node['address']}"
