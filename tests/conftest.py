"""What every test may count on: a scrubbed environment, one thread, repeatable examples.

torch is not imported here, because half of the packages must work without it.
"""

import os

import pytest
from hypothesis import settings

from tests import tiny
from trainer.data.shards import Dataset

# Sums depend on how many threads share them; read when torch is imported, here and in children.
os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")

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
