"""`fairway doctor` at the address of a cluster: what each of its nodes has, and what gangs lack."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

# Starts of Ray; on a machine that is busy with other work they take minutes.
pytestmark = [pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture
def two_nodes() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


def test_the_doctor_asks_every_node_of_a_cluster(two_nodes: Cluster, tmp_path: Path) -> None:
    words = ["quickstart", "-S", "resources.workers=4", "--home", str(tmp_path), "-o", "json"]
    command = [sys.executable, "-m", "service", "doctor", *words]

    done = subprocess.run(
        [*command, "--address", two_nodes.address], capture_output=True, text=True, timeout=600
    )

    assert done.returncode == 2, done.stderr
    rows = json.loads(done.stdout)
    nodes = [row["detail"].partition(": ")[2] for row in rows if row["name"] == "node"]
    assert sorted(nodes) == ["1 of 1 CPUs free", "2 of 2 CPUs free"]
    assert [(r["name"], r["detail"]) for r in rows if r["verdict"] == "fail"] == [
        ("gang", "resources: need 4 × 1 CPU on one node, have 2")
    ]
    assert len([row for row in rows if row["name"] == "kernel"]) == 2
    assert not list((tmp_path / "store").iterdir())
