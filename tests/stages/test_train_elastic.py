"""A training that may shrink and grow goes on with the machines that are left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from mint_ray.stages.train import train_student
from tests.stages.test_train_faults import STEPS, Uploads, assert_same_curve, config_class, make_tokens, train_untouched
from tests.tiny import save_tiny_student

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def two_nodes() -> Iterator[Cluster]:
    """A head and one more node, a processor each."""
    import ray

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "dashboard_host": "127.0.0.1"})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_two_workers_go_on_as_one_when_a_machine_is_lost(two_nodes: Cluster, tmp_path: Path) -> None:
    lost = two_nodes.add_node(num_cpus=1)
    two_nodes.wait_for_nodes()
    config = config_class(save_tiny_student(tmp_path / "student"), num_workers=(1, 2))
    tokens = make_tokens(tmp_path, config)
    untouched = train_untouched(tmp_path / "untouched", config, tokens)
    uploads = Uploads(tmp_path)
    sizes = []

    def lose() -> None:
        sizes.append(uploads.workers())
        two_nodes.remove_node(lost, allow_graceful=False)

    with uploads.watched(20, lose):
        trained = train_student(str(tmp_path), config, tokens)
    assert sizes == [2]
    assert trained.manifest.metrics["steps"] == STEPS
    assert_same_curve(trained, untouched)
    uploads.assert_once()
