"""What the files of cluster/ and jobs/ promise: that schemas accept them, that they agree, and that nothing is open."""

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

from mint_ray.config.loader import dump, fingerprint, load
from mint_ray.config.pipeline import PipelineConfig
from tests.cluster_heads import KEEPALIVE

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
LAUNCHED = sorted((ROOT / "cluster" / "autoscaler").glob("*.yaml"))
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
    """Name and spec of every RayCluster, those within RayJobs among them."""
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


@pytest.mark.parametrize("path", LAUNCHED, ids=name)
def test_rays_own_schema_accepts_what_the_launcher_reads(path: Path) -> None:
    validate_config(prepare_config(yaml.safe_load(path.read_text())))


@pytest.mark.parametrize("path", LAUNCHED, ids=name)
def test_a_launched_cluster_asks_for_a_token_and_hides_its_dashboard(path: Path) -> None:
    said = yaml.safe_load(path.read_text())
    for commands in (said["head_start_ray_commands"], said["worker_start_ray_commands"]):
        (start,) = (command for command in commands if " ray start " in command)
        assert "RAY_AUTH_MODE=token ray start" in re.sub(r" RAY_(?!AUTH)\w+=\w+", "", start)
        # without a token there is no start
        assert any(command.startswith("test -s ~/.ray/auth_token ||") for command in commands[: commands.index(start)])
    assert "--dashboard-host=127.0.0.1" in said["head_start_ray_commands"][-1]
    assert [source for target, source in said["file_mounts"].items() if target.endswith("/.ray/auth_token")] == [
        "~/.ray/auth_token"
    ]


@pytest.mark.parametrize("path", LAUNCHED, ids=name)
def test_a_cut_link_is_noticed_soon_on_every_machine_of_a_launched_cluster(path: Path) -> None:
    said = yaml.safe_load(path.read_text())
    for commands in (said["head_start_ray_commands"], said["worker_start_ray_commands"]):
        told = " ".join([*said.get("docker", {}).get("run_options", []), commands[-1]])
        for key, value in KEEPALIVE.items():
            assert f"{key}={value}" in told


@pytest.mark.parametrize("path", [path for path in LAUNCHED if path.stem != "local"], ids=name)
def test_a_cloud_cluster_has_no_work_on_its_head_and_scales_to_zero_on_spot(path: Path) -> None:
    said = yaml.safe_load(path.read_text())
    kinds = said["available_node_types"]
    assert kinds[said["head_node_type"]]["resources"] == {"CPU": 0}
    workers = {kind: told for kind, told in kinds.items() if kind != said["head_node_type"]}
    assert sum(told["resources"].get("GPU", 0) > 0 for told in workers.values()) == 1
    assert any("GPU" not in told["resources"] for told in workers.values())
    for told in workers.values():
        assert told["min_workers"] == 0
        config = told["node_config"]
        assert "SPOT" in str(config.get("scheduling")) or config["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert 0 < said["idle_timeout_minutes"] <= 10


@pytest.mark.parametrize("path", [path for path in LAUNCHED if path.stem != "local"], ids=name)
def test_a_cloud_cluster_reaches_its_bucket_by_role_and_never_by_key(path: Path) -> None:
    for told in yaml.safe_load(path.read_text())["available_node_types"].values():
        assert told["node_config"].get("IamInstanceProfile") or told["node_config"].get("serviceAccounts")
    assert not re.search(r"AKIA|aws_(access|secret)|SECRET|private_key_id", path.read_text(), re.IGNORECASE)


@pytest.mark.parametrize("cluster", clusters())
def test_rays_autoscaler_reads_from_a_manifest_what_is_meant(cluster: dict[str, Any]) -> None:
    cr = json.loads(json.dumps({"metadata": {"name": "x", "namespace": "mint-ray"}, "spec": cluster}))
    config = _derive_autoscaling_config_from_ray_cr(cr)
    kinds = config["available_node_types"]
    assert kinds.pop("headgroup")["resources"]["CPU"] == 0
    assert all(kind["min_workers"] == 0 and kind["max_workers"] > 0 for kind in kinds.values())
    assert {kind: told["resources"].get("GPU", 0) for kind, told in kinds.items()} == {
        kind: int(kind.startswith("gpu")) for kind in kinds
    }
    assert config["idle_timeout_minutes"] == 2


@pytest.mark.parametrize("cluster", clusters())
def test_every_kuberay_cluster_takes_its_token_from_a_secret(cluster: dict[str, Any]) -> None:
    assert cluster["authOptions"] == {"mode": "token", "secretName": "mint-ray-token"}
    assert (cluster["enableInTreeAutoscaling"], cluster["autoscalerOptions"]["version"]) == (True, "v2")


@pytest.mark.parametrize("cluster", clusters())
def test_every_pod_is_nobody_within_bounds_and_notices_a_cut_link(cluster: dict[str, Any]) -> None:
    for pod in pods(cluster):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["serviceAccountName"] == "mint-ray"
        assert pod["metadata"]["labels"] == {"app.kubernetes.io/part-of": "mint-ray"}  # whom the policy is about
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
def test_a_rayjob_ends_its_cluster_and_is_tried_again_with_its_state_in_a_bucket(path: Path) -> None:
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


def test_the_network_policy_lets_nobody_at_the_dashboard_but_the_pods_and_the_operator() -> None:
    (policy,) = (document for document in documents(MANIFESTS[0]) if document["kind"] == "NetworkPolicy")
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    reached = {
        json.dumps(rule["from"]): [port["port"] for port in rule.get("ports", [])] for rule in policy["spec"]["ingress"]
    }
    assert [ports for who, ports in reached.items() if "kuberay-operator" in who] == [[8265]]
    assert [who for who, ports in reached.items() if not ports] == [
        json.dumps([{"podSelector": {"matchLabels": {"app.kubernetes.io/part-of": "mint-ray"}}}])
    ]
    assert all(8265 not in ports for who, ports in reached.items() if "kuberay-operator" not in who)


@pytest.mark.parametrize("path", MANIFESTS, ids=name)
def test_kubernetes_accepts_its_own_kinds_and_the_pods_within_ours(path: Path) -> None:
    for document in documents(path):
        if document["kind"] in ("RayCluster", "RayJob"):
            cluster = document["spec"].get("rayClusterSpec", document["spec"])
            parts = [{"apiVersion": "v1", "kind": "Pod", **pod} for pod in pods(cluster)]
        else:
            # custom kinds of others have no schema here
            parts = [document] if document["kind"] != "PodMonitor" else []
        for part in parts:
            kubernetes_validate.validate(part, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.skipif(
    not (SHARED / "data" / "kuberay_crds").is_dir(), reason="KubeRay's schemas are not beside the project"
)
def test_kuberays_own_schemas_accept_every_manifest() -> None:
    tool, schemas = SHARED / "tools" / "kuberay_validate.py", SHARED / "data" / "kuberay_crds"
    done = subprocess.run([sys.executable, tool, schemas, *MANIFESTS], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "errors: 0", done.stdout


def test_image_manifests_and_lock_agree_on_versions() -> None:
    version, ray = project()["version"], locked("ray")
    tag = f"registry.example.com/mint-ray:{version}-ray{ray}"
    texts = [
        path.read_text()
        for path in [*LAUNCHED, *MANIFESTS, SKY, ROOT / "cluster" / "Containerfile", ROOT / "cluster" / "README.md"]
    ]
    images = {found for text in texts for found in re.findall(r"[\w.]+/mint-ray:[\w.-]+", text)}
    assert images == {tag}
    assert {cluster.values[0]["rayVersion"] for cluster in clusters()} == {ray}


def test_the_lock_holds_every_dependency_within_its_bounds_and_by_hash() -> None:
    wanted = [*project()["dependencies"], *project()["optional-dependencies"]["cluster"]]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(locked(canonicalize_name(requirement.name))), requirement
    lock = (ROOT / "cluster" / "requirements.lock").read_text()
    entries = re.split(r"\n(?=\w)", lock)
    assert all("--hash=sha256:" in entry for entry in entries if "==" in entry.split("\n")[0])
    assert (ROOT / "cluster" / "Containerfile").read_text().count("--require-hashes") == 1


def test_what_skypilot_runs_is_in_the_image_and_keeps_its_state_in_a_bucket() -> None:
    said = yaml.safe_load(SKY.read_text())
    assert said["resources"]["use_spot"] is True
    assert said["envs"]["ROOT"].startswith("s3://")
    verb, spec, *layers = said["run"].removeprefix("mint-ray ").split()
    assert (verb, layers[-2:]) == ("run", ["--root", '"$ROOT"'])
    local = [ROOT / path.removeprefix("/opt/mint_ray/") for path in (spec, layers[layers.index("--with") + 1])]
    assert load(PipelineConfig, local[0], layers=local[1:]).train.resources.gpus_per_worker == 1


@pytest.mark.parametrize("path", INFRA, ids=name)
def test_infrastructure_leaves_the_recipe_alone(path: Path) -> None:
    recipe = load(PipelineConfig, ROOT / "jobs" / "quickstart.yaml")
    laid = load(PipelineConfig, ROOT / "jobs" / "quickstart.yaml", layers=[path])
    assert laid != recipe
    assert fingerprint(dump(laid)) == fingerprint(dump(recipe))


def test_certificates_are_made_that_one_authority_answers_for(tmp_path: Path) -> None:
    script = ROOT / "cluster" / "tls.sh"
    first, second = tmp_path / "first", tmp_path / "second"
    subprocess.run([script, first], check=True, capture_output=True)
    subprocess.run([script, second, first / "ca.crt", first / "ca.key"], check=True, capture_output=True)
    for folder in (first, second):
        checked = ["openssl", "verify", "-CAfile", first / "ca.crt", "-verify_ip", "127.0.0.1", folder / "tls.crt"]
        assert subprocess.run(checked, check=True, capture_output=True, text=True).stdout.endswith("tls.crt: OK\n")
        assert (folder / "tls.key").stat().st_mode & 0o077 == 0
