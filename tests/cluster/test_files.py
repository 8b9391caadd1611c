"""Files of cluster/ and jobs/: valid against their schemas, consistent with each other, and closed to strangers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from mint_ray.config.loader import fingerprint, load
from mint_ray.config.pipeline import PipelineConfig
from tests.cluster_heads import KEEPALIVE

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
LAUNCHER_CONFIGS = sorted((ROOT / "cluster" / "autoscaler").glob("*.yaml"))
MANIFESTS = [
    *sorted((ROOT / "cluster" / "kuberay").glob("*.yaml")),
    *sorted((ROOT / "jobs" / "kuberay").glob("*.yaml")),
]
SKY = ROOT / "cluster" / "sky.yaml"
INFRA = sorted((ROOT / "jobs" / "infra").glob("*.yaml"))


def name(path: Path) -> str:
    return path.name


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def clusters() -> list[Any]:
    """Return every RayCluster spec, including those in RayJobs."""
    return [
        pytest.param(document["spec"].get("rayClusterSpec", document["spec"]), id=path.name)
        for path in MANIFESTS
        for document in documents(path)
        if document["kind"] in ("RayCluster", "RayJob")
    ]


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"] for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]]


def locked(package: str) -> str:
    lock = (ROOT / "cluster" / "requirements.lock").read_text()
    found = re.search(rf"^{package}==(\S+)", lock, re.MULTILINE)
    assert found, f"{package} is not in the lock"
    return found[1]


def project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]


@pytest.mark.parametrize("path", LAUNCHER_CONFIGS, ids=name)
def test_launcher_configs_are_valid(path: Path) -> None:
    validate_config(prepare_config(yaml.safe_load(path.read_text())))


@pytest.mark.parametrize("path", LAUNCHER_CONFIGS, ids=name)
def test_a_launched_cluster_requires_a_token_and_hides_its_dashboard(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        (start,) = (command for command in commands if " ray start " in command)
        assert "RAY_AUTH_MODE=token ray start" in re.sub(r" RAY_(?!AUTH)\w+=\w+", "", start)
        # without a token Ray does not start
        assert any(command.startswith("test -s ~/.ray/auth_token ||") for command in commands[: commands.index(start)])
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert [source for target, source in config["file_mounts"].items() if target.endswith("/.ray/auth_token")] == [
        "~/.ray/auth_token"
    ]


@pytest.mark.parametrize("path", LAUNCHER_CONFIGS, ids=name)
def test_every_node_of_a_launched_cluster_detects_a_lost_connection_soon(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        command = " ".join([*config.get("docker", {}).get("run_options", []), commands[-1]])
        for key, value in KEEPALIVE.items():
            assert f"{key}={value}" in command


@pytest.mark.parametrize("path", [path for path in LAUNCHER_CONFIGS if path.stem != "local"], ids=name)
def test_a_cloud_cluster_runs_nothing_on_its_head_and_scales_to_zero_on_spot(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    kinds = config["available_node_types"]
    assert kinds[config["head_node_type"]]["resources"] == {"CPU": 0}
    workers = {name: kind for name, kind in kinds.items() if name != config["head_node_type"]}
    assert sum(kind["resources"].get("GPU", 0) > 0 for kind in workers.values()) == 1
    assert any("GPU" not in kind["resources"] for kind in workers.values())
    for kind in workers.values():
        assert kind["min_workers"] == 0
        node = kind["node_config"]
        assert "SPOT" in str(node.get("scheduling")) or node["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert 0 < config["idle_timeout_minutes"] <= 10


@pytest.mark.parametrize("path", [path for path in LAUNCHER_CONFIGS if path.stem != "local"], ids=name)
def test_a_cloud_cluster_accesses_its_bucket_by_role_and_never_by_key(path: Path) -> None:
    for kind in yaml.safe_load(path.read_text())["available_node_types"].values():
        assert kind["node_config"].get("IamInstanceProfile") or kind["node_config"].get("serviceAccounts")
    assert not re.search(r"AKIA|aws_(access|secret)|SECRET|private_key_id", path.read_text(), re.IGNORECASE)


@pytest.mark.parametrize("cluster", clusters())
def test_rays_autoscaler_derives_the_intended_node_types_from_a_manifest(cluster: dict[str, Any]) -> None:
    cr = json.loads(json.dumps({"metadata": {"name": "x", "namespace": "mint-ray"}, "spec": cluster}))
    config = _derive_autoscaling_config_from_ray_cr(cr)
    kinds = config["available_node_types"]
    assert kinds.pop("headgroup")["resources"]["CPU"] == 0
    assert all(kind["min_workers"] == 0 and kind["max_workers"] > 0 for kind in kinds.values())
    assert {name: kind["resources"].get("GPU", 0) for name, kind in kinds.items()} == {
        name: int(name.startswith("gpu")) for name in kinds
    }
    assert config["idle_timeout_minutes"] == 2


@pytest.mark.parametrize("cluster", clusters())
def test_every_kuberay_cluster_reads_its_token_from_a_secret(cluster: dict[str, Any]) -> None:
    assert cluster["authOptions"] == {"mode": "token", "secretName": "mint-ray-token"}
    assert (cluster["enableInTreeAutoscaling"], cluster["autoscalerOptions"]["version"]) == (True, "v2")


@pytest.mark.parametrize("cluster", clusters())
def test_every_pod_is_unprivileged_limited_and_detects_a_lost_connection(cluster: dict[str, Any]) -> None:
    for pod in pods(cluster):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["serviceAccountName"] == "mint-ray"
        assert pod["metadata"]["labels"] == {
            "app.kubernetes.io/part-of": "mint-ray"
        }  # the NetworkPolicy selects pods by it
        (container,) = spec["containers"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert set(container["resources"]["limits"]) >= {"cpu", "memory"}
        env = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert KEEPALIVE.items() <= env.items()
        assert not [key for key in env if re.search("TOKEN|SECRET|KEY$|PASSWORD", key)]
    for group in cluster["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        keys = {toleration["key"] for toleration in group["template"]["spec"]["tolerations"]}
        assert ("nvidia.com/gpu" in limits) == ("nvidia.com/gpu" in keys) == group["groupName"].startswith("gpu")


@pytest.mark.parametrize("path", [path for path in MANIFESTS if path.name.startswith("ray-job")], ids=name)
def test_a_rayjob_deletes_its_cluster_and_retries_with_its_state_in_a_bucket(path: Path) -> None:
    (job,) = documents(path)
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] > 0
    script, given, *_ = spec["entrypoint"].removeprefix("python ").split()
    assert (ROOT / script.removeprefix("/opt/mint_ray/")).is_file()
    if given.startswith("/opt/mint_ray/"):
        load(PipelineConfig, ROOT / given.removeprefix("/opt/mint_ray/"))
        assert "--root s3://" in spec["entrypoint"]
    else:
        volumes = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
        assert {"name": "spec", "configMap": {"name": "mint-ray-spec"}} in volumes


def test_the_network_policy_admits_only_pods_and_operator_to_the_dashboard() -> None:
    (policy,) = (document for document in documents(MANIFESTS[0]) if document["kind"] == "NetworkPolicy")
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    allowed = {
        json.dumps(rule["from"]): [port["port"] for port in rule.get("ports", [])] for rule in policy["spec"]["ingress"]
    }
    assert [ports for who, ports in allowed.items() if "kuberay-operator" in who] == [[8265]]
    assert [who for who, ports in allowed.items() if not ports] == [
        json.dumps([{"podSelector": {"matchLabels": {"app.kubernetes.io/part-of": "mint-ray"}}}])
    ]
    assert all(8265 not in ports for who, ports in allowed.items() if "kuberay-operator" not in who)


@pytest.mark.parametrize("path", MANIFESTS, ids=name)
def test_kubernetes_kinds_and_pods_are_valid(path: Path) -> None:
    for document in documents(path):
        if document["kind"] in ("RayCluster", "RayJob"):
            cluster = document["spec"].get("rayClusterSpec", document["spec"])
            parts = [{"apiVersion": "v1", "kind": "Pod", **pod} for pod in pods(cluster)]
        else:
            # there is no schema of the Prometheus operator's kinds here
            parts = [document] if document["kind"] != "PodMonitor" else []
        for part in parts:
            kubernetes_validate.validate(part, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.skipif(not (SHARED / "data" / "kuberay_crds").is_dir(), reason="KubeRay's schemas are not available")
def test_manifests_are_valid_for_kuberay() -> None:
    tool, schemas = SHARED / "tools" / "kuberay_validate.py", SHARED / "data" / "kuberay_crds"
    done = subprocess.run([sys.executable, tool, schemas, *MANIFESTS], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "errors: 0", done.stdout


def test_image_tag_manifests_and_lock_have_the_same_versions() -> None:
    version, ray = project()["version"], locked("ray")
    tag = f"registry.example.com/mint-ray:{version}-ray{ray}"
    texts = [
        path.read_text()
        for path in [
            *LAUNCHER_CONFIGS,
            *MANIFESTS,
            SKY,
            ROOT / "cluster" / "Containerfile",
            ROOT / "cluster" / "README.md",
        ]
    ]
    images = {found for text in texts for found in re.findall(r"[\w.]+/mint-ray:[\w.-]+", text)}
    assert images == {tag}
    assert {cluster.values[0]["rayVersion"] for cluster in clusters()} == {ray}


def test_the_lock_pins_every_dependency_within_its_bounds_by_hash() -> None:
    required = [*project()["dependencies"], *project()["optional-dependencies"]["cluster"]]
    for requirement in map(Requirement, required):
        assert requirement.specifier.contains(locked(canonicalize_name(requirement.name))), requirement
    lock = (ROOT / "cluster" / "requirements.lock").read_text()
    entries = re.split(r"\n(?=\w)", lock)
    assert all("--hash=sha256:" in entry for entry in entries if "==" in entry.split("\n")[0])
    assert (ROOT / "cluster" / "Containerfile").read_text().count("--require-hashes") == 1


def test_skypilots_command_is_in_the_image_and_writes_to_a_bucket() -> None:
    config = yaml.safe_load(SKY.read_text())
    assert config["resources"]["use_spot"] is True
    assert config["envs"]["ROOT"].startswith("s3://")
    verb, spec, *layers = config["run"].removeprefix("mint-ray ").split()
    assert (verb, layers[-2:]) == ("run", ["--root", '"$ROOT"'])
    local = [ROOT / path.removeprefix("/opt/mint_ray/") for path in (spec, layers[layers.index("--with") + 1])]
    assert load(PipelineConfig, local[0], layers=local[1:]).train.resources.gpus_per_worker == 1


@pytest.mark.parametrize("path", INFRA, ids=name)
def test_infrastructure_does_not_change_the_fingerprint(path: Path) -> None:
    base = load(PipelineConfig, ROOT / "jobs" / "quickstart.yaml")
    merged = load(PipelineConfig, ROOT / "jobs" / "quickstart.yaml", layers=[path])
    assert merged != base
    assert fingerprint(merged) == fingerprint(base)


def test_certificates_of_several_machines_share_one_authority(tmp_path: Path) -> None:
    script = ROOT / "cluster" / "tls.sh"
    first, second = tmp_path / "first", tmp_path / "second"
    subprocess.run([script, first], check=True, capture_output=True)
    subprocess.run([script, second, first / "ca.crt", first / "ca.key"], check=True, capture_output=True)
    for folder in (first, second):
        checked = ["openssl", "verify", "-CAfile", first / "ca.crt", "-verify_ip", "127.0.0.1", folder / "tls.crt"]
        assert subprocess.run(checked, check=True, capture_output=True, text=True).stdout.endswith("tls.crt: OK\n")
        assert (folder / "tls.key").stat().st_mode & 0o077 == 0
