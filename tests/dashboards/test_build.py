"""Dashboards and alert rules: up to date, complete, documented, and about metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import ray.dashboard.modules.metrics.dashboards
import ray.dashboard.modules.reporter
import yaml
from ray.autoscaler._private.prom_metrics import AutoscalerPrometheusMetrics

from dashboards.build import DASHBOARDS, FOLDER, build
from mint_ray.telemetry import METRICS

ALERTS = FOLDER / "alerts.yaml"
FIRING = Path(__file__).with_name("alerts.yaml")
README = (FOLDER / "README.md").read_text()
RULES = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
NAME = re.compile(r"\b(?:ray|mint|autoscaler)_\w+")

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool: the distribution's package prometheus brings it"
)


def panels(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((FOLDER / f"{name}.json").read_text())["panels"]
    return found


def expressions(name: str) -> list[str]:
    return [target["expr"] for panel in panels(name) for target in panel["targets"]]


def names_in(expression: str) -> set[str]:
    """Return the names of the series in an expression, without labels."""
    return set(NAME.findall(re.sub(r"\{[^}]*\}", "", expression)))


def our_series() -> set[str]:
    """Return the series that mint_ray exports."""
    return {series for metric in METRICS.values() for series in metric.series}


def ray_series() -> set[str]:
    """Return the series of Ray's own dashboards, of its node reporter and of its autoscaler."""
    dashboards = Path(ray.dashboard.modules.metrics.dashboards.__file__).parent.glob("*_panels.py")
    found = {name for path in dashboards for name in NAME.findall(path.read_text())}
    reporter = (Path(ray.dashboard.modules.reporter.__file__).parent / "reporter_agent.py").read_text()
    found |= {f"ray_{name}" for name in re.findall(r"Gauge\(\s*\"(\w+)\"", reporter)}
    families = AutoscalerPrometheusMetrics("session").registry.collect()
    return found | {family.name + ("_total" if family.type == "counter" else "") for family in families}


@pytest.mark.parametrize("name", DASHBOARDS)
def test_the_committed_json_is_up_to_date(name: str) -> None:
    assert (FOLDER / f"{name}.json").read_text() == build(name), "run python -m dashboards.build"


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_uses_only_series_that_we_or_ray_export(name: str) -> None:
    for expression in expressions(name):
        assert names_in(expression), expression
        assert names_in(expression) <= our_series() | ray_series()


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_panel_has_a_title_a_description_a_unit_and_the_selected_data_source(name: str) -> None:
    found = panels(name)
    assert len({panel["id"] for panel in found}) == len({panel["title"] for panel in found}) == len(found)
    for panel in found:
        assert panel["title"][0].isupper()
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    dashboard = json.loads((FOLDER / f"{name}.json").read_text())
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = {name for expression in expressions(name) for name in re.findall(r"\$(\w+)", expression)}
    assert used - {"__rate_interval"} <= variables
    assert "datasource" in variables
    assert {"/d/rayDefaultDashboard", "/d/rayTrainDashboard"} <= {link.get("url") for link in dashboard["links"]}


def test_every_metric_is_on_a_dashboard() -> None:
    shown = {name for dashboard in DASHBOARDS for expression in expressions(dashboard) for name in names_in(expression)}
    assert {metric.name for metric in METRICS.values() if not shown & set(metric.series)} == set()


def test_alerts_use_only_series_that_we_or_ray_export() -> None:
    for rule in RULES:
        found = names_in(rule["expr"]) | set(re.findall(r"mint:\w+:\w+", rule["expr"]))
        assert found
        assert found <= our_series() | ray_series() | {each["record"] for each in RULES if "record" in each}


def test_the_readme_documents_every_alert_and_every_metric() -> None:
    for rule in RULES:
        if "alert" in rule:
            assert f"### {rule['alert']}\n" in README
            assert rule["annotations"]["runbook_url"] == f"dashboards/README.md#{rule['alert'].lower()}"
    table = [line for line in README.splitlines() if line.startswith("| `ray_mint_")]
    assert table == [
        f"| `{metric.series[0].removesuffix('_bucket')}` | {metric.kind} | {metric.unit} | {metric.description} "
        f"| {', '.join(metric.tags)} |"
        for metric in METRICS.values()
    ]


def test_the_pod_monitor_selects_the_metrics_port_of_every_pod() -> None:
    kuberay = FOLDER.parent / "cluster" / "kuberay"
    base = [document for document in yaml.safe_load_all((kuberay / "base.yaml").read_text()) if document]
    (monitor,) = (document["spec"] for document in base if document["kind"] == "PodMonitor")
    assert "metrics" in {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]}
    for path in [*kuberay.glob("ray-*.yaml"), *(FOLDER.parent / "jobs" / "kuberay").glob("*.yaml")]:
        (spec,) = (d["spec"] for d in yaml.safe_load_all(path.read_text()) if d and d["kind"].startswith("Ray"))
        cluster = spec.get("rayClusterSpec", spec)
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            labels = group["template"]["metadata"]["labels"]
            assert monitor["selector"]["matchLabels"].items() <= labels.items()
            (container,) = group["template"]["spec"]["containers"]
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert ports["metrics"] == int(group["rayStartParams"]["metrics-export-port"])


@needs_promtool
@pytest.mark.parametrize(
    "check", [["check", "rules", str(ALERTS)], ["check", "config", str(FOLDER / "prometheus.yaml")]]
)
def test_prometheus_accepts_its_files(check: list[str]) -> None:
    done = subprocess.run(["promtool", *check], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@needs_promtool
def test_every_alert_fires_and_stays_silent_on_the_example_series() -> None:
    done = subprocess.run(["promtool", "test", "rules", str(FIRING)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = [case for test in yaml.safe_load(FIRING.read_text())["tests"] for case in test["alert_rule_test"]]
    for fires in (True, False):
        assert {case["alertname"] for case in cases if bool(case["exp_alerts"]) == fires} == {
            rule["alert"] for rule in RULES if "alert" in rule
        }
