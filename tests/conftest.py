"""What every test may count on: a scrubbed environment, one thread, repeatable examples.

torch is not imported here, because half of the packages must work without it.
"""

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests import tiny
from trainer.data.shards import Dataset

# Sums depend on how many threads share them; read when torch is imported, here and in children.
os.environ["OMP_NUM_THREADS"] = "1"

# How long a machine takes, which may stand still for half a minute, says nothing about the code:
# no example is too slow, and no server out of reach before it has had time to answer.
settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")
os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")

# Two clusters at once on two cores keep one another from starting in time.
_START_RAY = {
    "integration/test_320_points.py",
    "integration/test_control.py",
    "integration/test_doctor.py",
    "integration/test_engine.py",
    "integration/test_engine_kills.py",
    "integration/test_gangs.py",
    "integration/test_janitor.py",
    "integration/test_ray_jobs.py",
    "integration/test_searcher.py",
    "integration/test_sweep.py",
    "unit/test_cluster.py",
}
_SCRUBBED_PREFIXES = ("FAIRWAY_", "RAY_ADDRESS", "MLFLOW_TRACKING_URI")


@pytest.fixture(autouse=True)
def scrubbed_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what a developer's shell would tell the packages."""
    for name in list(os.environ):
        if name.startswith(_SCRUBBED_PREFIXES):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Prepare the micro dataset once; tests that damage files copy it first."""
    return tiny.dataset(tmp_path_factory.mktemp("data"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where tests run side by side, keep a file's in one process, and all that start Ray in one."""
    from xdist.scheduler import LoadFileScheduling

    class OneRay(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if file.removeprefix("tests/") in _START_RAY else file

    return OneRay(config, log) if config.getoption("dist") == "loadfile" else None
