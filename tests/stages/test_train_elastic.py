"""A training whose number of workers may change continues on the nodes that are left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from mint_ray.stages.train import train_student
from tests.stages.test_train_faults import NUM_STEPS, Uploads, assert_same_curve, make_config, train_here, write_tokens
from tests.tiny import save_tiny_student

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def two_nodes() -> Iterator[Cluster]:
    """Start a head node and one more node with one CPU each."""
    import ray

    # this process may be connected to the cluster of another module
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "dashboard_host": "127.0.0.1"})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_one_worker_continues_after_a_node_failure(two_nodes: Cluster, tmp_path: Path) -> None:
    node = two_nodes.add_node(num_cpus=1)
    two_nodes.wait_for_nodes()
    config = make_config(save_tiny_student(tmp_path / "student"), num_workers=(1, 2))
    tokens = write_tokens(tmp_path, config)
    undisturbed = train_here(tmp_path / "undisturbed", config, tokens)
    uploads = Uploads(tmp_path)
    num_workers = []

    def fail() -> None:
        num_workers.append(uploads.num_workers())
        two_nodes.remove_node(node, allow_graceful=False)

    with uploads.watch(20, fail):
        trained = train_student(str(tmp_path), config, tokens)
    assert num_workers == [2]
    assert trained.manifest.metrics["steps"] == NUM_STEPS
    assert_same_curve(trained, undisturbed)
    uploads.assert_once()
