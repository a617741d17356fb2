"""A real service for tests: a home with micro data, a database, the app, a server on a free port.

Nothing is started by it but what a test asks for: without `working` no sweep is run.
"""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from service.api import planner
from service.api.app import make_app
from service.api.lifespan import Server, address_of, listen, opened
from service.api.services import Services
from service.api.settings import Settings
from service.jobs.runner import Runner
from service.queue import database
from service.queue.records import Role
from tests import tiny
from trainer.codec import to_yaml
from trainer.data.shards import Dataset

PATIENCE_S = 240
"""For whoever waits for an answer, a turn or a plan: a busy machine may stand still for a while."""
SWEEP: dict[str, Any] = {
    "name": "micro",
    "recipe": "micro.yaml",
    "space": {"train.schedule.warmdown_iters": {"phase": "train", "values": [2, 4]}},
}


def home_with(folder: Path, dataset: Dataset) -> Path:
    """A Fairway home that has the micro dataset."""
    home = folder / "home"
    shutil.copytree(dataset.folder, home / "data" / dataset.name)
    return home


def submission(**changes: Any) -> dict[str, Any]:
    """The body that submits the micro sweep, some of its fields changed."""
    return {
        "sweep": to_yaml({**SWEEP, **changes}),
        "files": {"micro.yaml": to_yaml(tiny.recipe_data())},
        "assignments": [],
    }


@contextmanager
def opened_service(
    home: Path, *, runner: Runner | None = None, **changes: Any
) -> Iterator[Services]:
    """A service's parts, none of them running."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "BUSY_S", PATIENCE_S)
        patch.setattr(planner, "WAIT_S", PATIENCE_S)
        with opened(Settings(home=home, port=0, **changes), runner) as services:
            services.planner._timeout_s = PATIENCE_S
            yield services


def token(services: Services, user: str, role: str) -> dict[str, str]:
    """The header with a new token of a user."""
    _, secret = services.tokens.create(user, Role(role))
    return {"Authorization": f"Bearer {secret}"}


@contextmanager
def client_of(services: Services, **options: Any) -> Iterator[TestClient]:
    """A client that calls the app without a network, as from this machine."""
    app = make_app(services.settings, services=services)
    options = {"base_url": "http://127.0.0.1", "client": ("127.0.0.1", 50_000), **options}
    with TestClient(app, **options) as client:
        yield client


@contextmanager
def served(services: Services) -> Iterator[httpx2.Client]:
    """A client of the app behind a real server on a free port."""
    with listen("127.0.0.1", 0) as listener:
        server = Server(make_app(services.settings, services=services), services)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            with httpx2.Client(
                base_url=address_of(listener), trust_env=False, timeout=PATIENCE_S
            ) as client:
                yield client
        finally:
            services.stopping.set()
            server.should_exit = True
            thread.join()
