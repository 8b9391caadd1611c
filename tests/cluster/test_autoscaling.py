"""Ray's autoscaler with nodes that are local processes: a scoring job scales from zero nodes to two and back."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.util import get_node_ip_address

from mint_ray.artifacts import verify
from tests.cluster_heads import KEEPALIVE, ROOT, TOKEN, Head, free_port, start_head

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
COMMANDS = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files"),
    *("rsync_exclude", "rsync_filter"),
)


def write_config(path: Path, gcs_address: str) -> Path:
    """Write the config of a head without CPUs and up to two nodes with one CPU each."""
    node = {"resources": {"CPU": 1, "object_store_memory": 100_000_000}, "node_config": {}, "min_workers": 0}
    config = {
        "cluster_name": "mint-ray",
        "max_workers": 2,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "gcs_address": gcs_address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "node": node | {"max_workers": 2},
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.25,
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in COMMANDS},
    }
    path.write_text(json.dumps(config))
    return path


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    ip, port = get_node_ip_address(), free_port()
    config = write_config(tmp_path / "autoscaler.json", f"{ip}:{port}")
    environment = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    options = ("--num-cpus=0", f"--autoscaling-config={config}")
    with start_head(*options, ip=ip, port=port, **environment, **KEEPALIVE) as running:
        yield running


def count_nodes(head: Head) -> int:
    """Return the number of nodes, the head not counted."""
    response = requests.get(
        f"{head.address}/api/v0/nodes", headers={"Authorization": f"Bearer {TOKEN}"}, params={"limit": 100}, timeout=30
    )
    response.raise_for_status()
    nodes = response.json()["data"]["result"]["result"]
    return sum(node["state"] == "ALIVE" and not node["is_head_node"] for node in nodes)


def test_a_scoring_job_scales_a_bare_head_to_two_nodes_and_back(head: Head, tmp_path: Path) -> None:
    root, log, started = tmp_path / "out", tmp_path / "follow.log", time.monotonic()
    assert count_nodes(head) == 0
    follower = head.start_mint_ray(
        "submit", str(ROOT / "jobs" / "quickstart.yaml"), "--verb", "score", "--follow", "--shared-disk",
        "--root", str(root), "prepare.source.num_diseases=8", "prepare.rows_per_part=4", "score.resources.actors=2",
        log=log,
    )  # fmt: skip
    counts = [0]
    try:
        while follower.poll() is None:
            assert time.monotonic() - started < 900, log.read_text()[-4000:]
            if (now := count_nodes(head)) != counts[-1]:
                counts.append(now)
                print(f"{time.monotonic() - started:.1f} s: {now} nodes", flush=True)
            time.sleep(0.3)
    finally:
        follower.kill()
        follower.wait()
    assert follower.returncode == 0, log.read_text()[-4000:]
    (scores,) = root.glob("score-*")
    assert verify(str(scores)) == []
    assert max(counts) == 2
    while count_nodes(head):
        assert time.monotonic() - started < 1200, "the nodes are not removed"
        time.sleep(0.5)
    print(f"{time.monotonic() - started:.1f} s: none left")
