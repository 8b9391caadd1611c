"""Find what is wrong with a cluster before money is spent on it: open doors, drift, missing GPUs, storage, clocks."""

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
from mint_ray.config.loader import UserError
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.remote import jobs

SKEW_SECONDS = 5.0
"""Clocks may differ by so much; S3 refuses requests from 900 on, and logs cannot be put in order long before."""
PROBE_SECONDS = 180
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    about: str
    state: Literal["good", "bad", "unknown"]
    text: str

    def __str__(self) -> str:
        return f"{self.state:<8}{self.about}: {self.text}"


@dataclass(frozen=True, slots=True)
class Demand:
    """GPUs that a stage asks for."""

    stage: str
    workers: int
    gpus: float
    """Of each worker."""

    def __str__(self) -> str:
        return f"{self.stage} asks for {self.workers} x {self.gpus:g}"


def examine(address: str, config: PipelineConfig | None) -> Iterator[Finding]:
    """Look at the cluster behind the dashboard at `address`, and at what the spec `config` needs of it.

    A script runs on every machine for seconds; no machine is started for it. Findings come as they are made.
    """
    door, clock = _look_at_door(address)
    yield door
    if clock is None:
        return
    try:
        client = jobs.connect(address)
    except (UserError, RuntimeError) as error:
        yield Finding("token", "bad", str(error))
        return
    yield from _judge_transport(address)
    yield clock
    try:
        asked = [storage.absolute(config.root)] if config else []
        report = jobs.run_script(client, "doctor", "probe", asked, PROBE_SECONDS)
    except (RuntimeError, TimeoutError) as error:
        yield Finding("probe", "bad", str(error))
        return
    yield from judge(report, versions(), config)


def judge(report: dict[str, Any], here: dict[str, str], config: PipelineConfig | None) -> Iterator[Finding]:
    """What the machines' answers (`mint_ray.remote.doctor_agent.examine`) amount to, beside the versions `here`."""
    answered = [node for node in report["nodes"] if "error" not in node]
    for node in report["nodes"]:
        if "error" in node:
            yield Finding("machines", "bad", f"{_name(node)} does not answer: {node['error']}")
    yield from _judge_versions(answered, here)
    yield from _judge_clocks(answered)
    if config is not None:
        yield from _judge_storage(answered, config.root)
        yield _judge_gpus(report["nodes"], report["groups"], demands(config))


def versions() -> dict[str, str]:
    """Those of this machine."""
    return {
        "python": platform.python_version(),
        "ray": ray.__version__,
        "mint-ray": importlib.metadata.version("mint-ray"),
    }


def demands(config: PipelineConfig) -> list[Demand]:
    """GPUs that the stages ask for, stage by stage, least number of workers."""
    score, train, evaluate = config.score.resources, config.train.resources, config.evaluate.resources
    least = train.num_workers if isinstance(train.num_workers, int) else train.num_workers[0]
    found = [
        Demand("score", score.actors, score.gpus_per_actor),
        Demand("join", 1, config.join.resources.gpus if config.join else 0),
        Demand("train", least, train.gpus_per_worker),
        Demand("evaluate", evaluate.actors, evaluate.gpus_per_actor),
    ]
    return [demand for demand in found if demand.gpus]


def _look_at_door(address: str) -> tuple[Finding, Finding | None]:
    """Whether the dashboard answers whom it does not know, and how its clock stands to ours; None for nobody there."""
    before = time.time()
    try:
        answer = requests.get(f"{address.rstrip('/')}/api/jobs/", timeout=30, allow_redirects=False)
    except requests.RequestException as error:
        return Finding("dashboard", "bad", f"{address}: nobody answers: {' '.join(str(error).split())}"), None
    clock = judge_date(answer.headers.get("Date"), before, time.time())
    if answer.status_code in (401, 403) or answer.is_redirect:
        return Finding("dashboard", "good", f"asks for a token (status {answer.status_code})"), clock
    if answer.ok:
        text = "open: whoever reaches it runs commands on the cluster; start it with RAY_AUTH_MODE=token"
        return Finding("dashboard", "bad", text), clock
    return Finding("dashboard", "unknown", f"status {answer.status_code} without a token"), clock


def _judge_transport(address: str) -> Iterator[Finding]:
    parts = urlsplit(address)
    if parts.scheme == "http" and parts.hostname not in LOOPBACK:
        text = f"the token goes to {parts.hostname} unencrypted; forward the port, or put TLS before the dashboard"
        yield Finding("transport", "unknown", text)


def judge_date(date: str | None, before: float, after: float) -> Finding:
    """By the `Date` of an answer, which has whole seconds, that came between two looks at our clock."""
    if date is None:
        return Finding("clocks", "unknown", "the head's answer has no date")
    there = email.utils.parsedate_to_datetime(date).timestamp()
    ahead = there - after if there > after else min(there + 1 - before, 0)
    if abs(ahead) > SKEW_SECONDS:
        return Finding("clocks", "bad", f"the head's is {ahead:+.0f} s from this machine's")
    return Finding("clocks", "good", "the head's agrees with this machine's")


def _judge_versions(nodes: list[dict[str, Any]], here: dict[str, str]) -> Iterator[Finding]:
    drifted = False
    for package, ours in here.items():
        for node in nodes:
            theirs = node["versions"][package]
            if theirs is None:
                yield Finding("versions", "bad", f"{_name(node)} has no {package}")
            elif _release(package, theirs) != _release(package, ours):
                yield Finding("versions", "bad", f"{_name(node)} has {package} {theirs}, this machine {ours}")
            else:
                continue
            drifted = True
    if nodes and not drifted:
        alike = ", ".join(f"{package} {version}" for package, version in here.items())
        yield Finding("versions", "good", f"{alike} on {_count(nodes)} as here")


def _release(package: str, version: str) -> str:
    """What must agree: Python's micro releases understand each other."""
    return ".".join(version.split(".")[:2]) if package == "python" else version


def _judge_clocks(nodes: list[dict[str, Any]]) -> Iterator[Finding]:
    for node in nodes:
        if abs(node["skew"]) - node["skew_error"] > SKEW_SECONDS:
            yield Finding("clocks", "bad", f"that of {_name(node)} is {node['skew']:+.1f} s from the head's")


def _judge_storage(nodes: list[dict[str, Any]], root: str) -> Iterator[Finding]:
    asked = [node for node in nodes if node["versions"]["mint-ray"] is not None]
    wrong = [node for node in asked if node["storage"]]
    for node in wrong:
        yield Finding("storage", "bad", f"from {_name(node)}: {node['storage']}")
    if not [node for node in asked if not node["head"]]:
        state = "only the head is up, and it" if asked else "nobody is up who"
        yield Finding("storage", "unknown", f"{root} was not tried from a worker: {state} could be asked")
    elif not wrong:
        yield Finding("storage", "good", f"{root} can be written from {_count(asked)}")


def _judge_gpus(nodes: list[dict[str, Any]], groups: list[dict[str, Any]] | str, asked: list[Demand]) -> Finding:
    """Whether what each stage asks for is up or can be had: a cluster scaled to zero has none and is well."""
    if not asked:
        return Finding("gpus", "good", "the spec asks for none")
    up = [node["gpus"] for node in nodes]
    missing = [demand for demand in asked if _fit(demand, up) < demand.workers]
    if not missing:
        return Finding("gpus", "good", f"{_listed(up)} up, enough for every stage")
    if isinstance(groups, str):
        text = f"{missing[0]}; {_listed(up)} up, and what the autoscaler could add is not known: {groups}"
        return Finding("gpus", "unknown", text)
    most = [group["gpus"] for group in groups for _ in range(group["most"])]
    beyond = [demand for demand in missing if _fit(demand, most) < demand.workers]
    if not beyond:
        return Finding(
            "gpus", "good", f"{_listed(up)} up; the autoscaler may have {_listed(most)}, enough for every stage"
        )
    can = f"the autoscaler may have {_listed(most)} at most" if groups else "no autoscaler adds any"
    return Finding("gpus", "bad", f"{beyond[0]}; {_listed(up)} up, and {can}")


def _fit(demand: Demand, machines: list[float]) -> int:
    """Workers that these machines hold, each within one of them."""
    return sum(int(gpus / demand.gpus + 1e-9) for gpus in machines)


def _listed(machines: list[float]) -> str:
    have = [gpus for gpus in machines if gpus]
    return f"{sum(have):g} GPU{'s' if sum(have) != 1 else ''}" + (f" on {_count(have)}" if have else "")


def _count(machines: list[Any]) -> str:
    return f"{len(machines)} machine{'s' if len(machines) != 1 else ''}"


def _name(node: dict[str, Any]) -> str:
    return f"the head ({node['address']})" if node["head"] else f"machine {node['address']}"
