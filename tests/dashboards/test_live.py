"""A real Prometheus scrapes a real Ray head: metrics of runs arrive, and every expression of a dashboard has values."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from dashboards.build import DASHBOARDS, FOLDER
from mint_ray.artifacts import Manifest, read_manifest
from tests.cluster_heads import Head, free_port, start_head
from tests.tiny import save_tiny_student

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="no prometheus: the distribution's package of that name brings it"
    ),
]

SWEEP_SECONDS = 500


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    address: str
    started: float

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series of the expression from the start until now."""
        parameters = {"query": expression, "start": self.started, "end": time.time(), "step": 2}
        response = requests.get(f"{self.address}/api/v1/query_range", params=parameters, timeout=30).json()
        assert response["status"] == "success", f"{expression}: {response['error']}"
        found: list[dict[str, Any]] = response["data"]["result"]
        return found

    def last(self, expression: str) -> float:
        """Return the last value of an expression with one series."""
        [series] = self.query(expression)
        return float(series["values"][-1][1])


@contextmanager
def start_prometheus(head: Head) -> Iterator[Prometheus]:
    """Start Prometheus with the committed config, except for the head's folder and the scrape interval."""
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(FOLDER / path) for path in config["rule_files"]]
    (ray_job,) = config["scrape_configs"]
    (discovery,) = ray_job["file_sd_configs"]
    discovery["files"] = [path.replace("/tmp/ray", str(head.folder)) for path in discovery["files"]]
    file = head.folder / "prometheus.yaml"
    file.write_text(yaml.safe_dump(config))
    listen = f"127.0.0.1:{free_port()}"
    data = f"--storage.tsdb.path={head.folder / 'prometheus'}"
    with (head.folder / "prometheus.log").open("wb") as log:
        command = ["prometheus", f"--config.file={file}", data, f"--web.listen-address={listen}"]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait(f"http://{listen}/-/ready", server)
        yield Prometheus(f"http://{listen}", time.time())
    finally:
        server.terminate()
        server.wait()


def _wait(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if requests.get(url, timeout=1).ok:
                return
        except requests.RequestException:
            pass
        time.sleep(0.25)
    raise RuntimeError("Prometheus did not start")


def write_spec(folder: Path) -> Path:
    spec = folder / "tiny.yaml"
    spec.write_text(f"""
root: {folder / "out"}
task: {{kind: rare_disease, max_findings: 3, max_absent: 0}}
prepare:
  source: {{kind: hpo, num_diseases: 8, patients_per_disease: 4}}
  splits: {{validation: 0.25, test: 0.25}}
pair: {{sampler: {{kind: hard, top: 2}}}}
train:
  student: {{model_id: {save_tiny_student(folder / "student")}, lora_rank: 2}}
  trainer: {{train_batch_size: 8, max_length: 2048, max_steps: 4, eval_steps: 2, logging_steps: 1}}
  resources: {{cpus_per_worker: 1}}
evaluate:
  generation: {{max_new_tokens: 4}}
  resources: {{cpus_per_actor: 1}}
sweep:
  metric: readable
  n_trials: 1
  finalists: 1
  num_seeds: 0
  search: {{kind: grid}}
  resources: {{max_concurrent: 1}}
  # the only trial is the spec itself, whose artifacts exist already
  space: {{train.trainer.lr_scheduler_type: {{kind: choice, choices: [cosine]}}}}
""")
    return spec


@dataclass(frozen=True)
class SweepRun:
    """A finished sweep whose metrics Prometheus has scraped."""

    prometheus: Prometheus
    root: Path

    def manifests(self, stage: str) -> list[Manifest]:
        return [read_manifest(str(path.parent)) for path in self.root.glob(f"{stage}-*/manifest.json")]


@pytest.fixture(scope="module")
def sweep_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SweepRun]:
    folder = tmp_path_factory.mktemp("live")
    # Ray drops a gauge after twice this interval, and reports its nodes every five seconds
    with start_head(token=None, RAY_metrics_report_interval_ms="4000") as head, start_prometheus(head) as prometheus:
        command = [sys.executable, "-m", "mint_ray.cli", "sweep", str(write_spec(folder)), "--json"]
        variables = head.environment | {"RAY_ADDRESS": f"127.0.0.1:{head.port}", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SWEEP_SECONDS, env=dict(os.environ) | variables
        )
        assert done.returncode == 0, done.stderr[-4000:]
        time.sleep(5)
        yield SweepRun(prometheus, folder / "out")


def with_all_runs(expression: str) -> str:
    """Return the expression that Grafana sends with all runs selected."""
    return re.sub(r"\$run\b", ".*", expression.replace("$__rate_interval", "1m"))


@pytest.mark.parametrize("dashboard", DASHBOARDS)
def test_every_expression_of_a_dashboard_has_values(sweep_run: SweepRun, dashboard: str) -> None:
    empty = []
    for panel in json.loads((FOLDER / f"{dashboard}.json").read_text())["panels"]:
        for target in panel["targets"]:
            series = sweep_run.prometheus.query(with_all_runs(target["expr"]))
            if not any(math.isfinite(float(value)) for each in series for _, value in each["values"]):
                empty.append((panel["title"], target["expr"]))
    assert empty == []


def test_counters_equal_the_counts_of_the_manifests(sweep_run: SweepRun) -> None:
    last = sweep_run.prometheus.last
    (score,), (pair,) = sweep_run.manifests("score"), sweep_run.manifests("pair")
    assert last("sum(ray_mint_records_scored_total)") == score.counts["scores"]
    assert last("sum(ray_mint_pairs_written_total)") == pair.counts["pairs_train"] + pair.counts["pairs_validation"]
    for stage, manifest in {"score": score, "pair": pair}.items():
        parts = sum(file.bytes for file in manifest.files if file.path.endswith(".parquet"))
        assert last(f'sum(ray_mint_bytes_written_total{{stage="{stage}"}})') == parts


def test_training_metrics_equal_the_log_history(sweep_run: SweepRun) -> None:
    names = {"loss": "loss", "nll_loss": "nll_loss", "rewards_accuracies": "rewards/accuracies"}
    for path in sweep_run.root.glob("train-*/outcome.json"):
        run, outcome = path.parent.name, json.loads(path.read_text())
        for name, key in names.items():
            for split, prefix in (("train", ""), ("validation", "eval_")):
                (series,) = sweep_run.prometheus.query(f'ray_mint_{name}{{run="{run}", split="{split}"}}')
                logged = [row[prefix + key] for row in outcome["log_history"] if prefix + key in row]
                assert float(series["values"][-1][1]) == pytest.approx(logged[-1])
        tokens = sweep_run.prometheus.last(f'sum(ray_mint_tokens_trained_total{{run="{run}"}})')
        assert tokens == outcome["metrics"]["tokens"]
        assert (
            sweep_run.prometheus.last(f'sum(ray_mint_step_seconds_count{{run="{run}"}})') == outcome["metrics"]["steps"]
        )


def test_stages_were_reported_as_running_and_no_alert_fired(sweep_run: SweepRun) -> None:
    running = {
        series["metric"]["stage"]
        for series in sweep_run.prometheus.query("max by (stage) (ray_mint_stage_running)")
        if any(value == "1" for _, value in series["values"])
    }
    assert {"train", "answer"} <= running
    assert sweep_run.prometheus.last('sum(ray_mint_sweep_trials{state="complete"})') == 1
    assert sweep_run.prometheus.query('ALERTS{alertstate="firing"}') == []
