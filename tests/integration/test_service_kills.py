"""The service is killed at any moment; no sweep is lost, none runs twice, all end right."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.bundle import Bundle
from service.client import Client
from service.ledger import read
from service.paths import Paths
from tests.ports import free_port
from tests.serving import home_with, submission
from trainer.data.shards import Dataset
from trainer.errors import FairwayError

ROOT = Path(__file__).resolve().parents[2]
KILLS, NUM_SWEEPS = 30, 8
LIVES_S = 3.0  # at most, after it listens; planning a first submission takes half of that
START_S, END_S = 240.0, 600.0


class Service:
    """The whole service as a process that can be killed and started again on the same port."""

    def __init__(self, home: Path) -> None:
        self.home = home
        port = free_port()
        self.address = f"http://127.0.0.1:{port}"
        self._at = ("127.0.0.1", port)
        words = ["--home", str(home), "--port", str(port), "--gangs", "2"]
        with (home / "service.log").open("ab") as log:
            self._launcher = subprocess.Popen(
                [sys.executable, "-m", "tests.quick_service", *words],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def start(self) -> None:
        """Start it and wait until it listens."""
        launcher = self._launcher
        assert launcher.stdin is not None
        assert launcher.stdout is not None
        launcher.stdin.write("start\n")
        launcher.stdin.flush()
        self._pid = int(launcher.stdout.readline())
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                socket.create_connection(self._at, 10).close()
                return
            except OSError:
                time.sleep(0.01)
        raise TimeoutError((self.home / "service.log").read_text()[-2000:])

    def kill(self, sign: int = signal.SIGKILL) -> None:
        """Kill it and wait until it is gone."""
        os.kill(self._pid, sign)
        deadline = time.monotonic() + START_S
        while Path(f"/proc/{self._pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    def close(self) -> None:
        self.kill(signal.SIGTERM)
        assert self._launcher.stdin is not None
        assert self._launcher.stdout is not None
        self._launcher.stdin.close()
        self._launcher.wait(START_S)
        self._launcher.stdout.close()


@pytest.fixture
def service(
    tmp_path: Path, tiny_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Service]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    made = Service(home_with(tmp_path, tiny_dataset))
    yield made
    made.close()


def sweep_named(name: str) -> Bundle:
    body = submission(name=name, limits={"infra_retries": 4})
    return Bundle(body["sweep"], body["files"])


def submit_all(address: str, seen: dict[str, str]) -> None:
    """A laptop that submits sweep after sweep, each twice under one key, and does not give up."""
    for number in range(NUM_SWEEPS):
        name = f"sweep-{number}"
        for _ in range(2):
            sweep = insist(address, name)
            assert seen.setdefault(name, sweep["id"]) == sweep["id"]
        time.sleep(2.0)


def insist(address: str, name: str) -> dict[str, Any]:
    deadline = time.monotonic() + END_S
    while True:
        try:
            with Client(address, timeout_s=60) as client:
                return client.submit(sweep_named(name), key=name)
        except FairwayError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@pytest.mark.timeout(1_500)
def test_thirty_kills_lose_no_sweep_and_start_none_twice(service: Service) -> None:
    chance = random.Random(6)
    acknowledged: dict[str, str] = {}
    service.start()
    laptop = threading.Thread(target=submit_all, args=(service.address, acknowledged))
    laptop.start()
    for _ in range(KILLS):
        time.sleep(chance.uniform(0.0, LIVES_S))
        service.kill()
        service.start()
    laptop.join(END_S)
    sweeps = wait_for_all(service)

    assert len(acknowledged) == NUM_SWEEPS
    assert {sweep["id"] for sweep in sweeps} == set(acknowledged.values())
    assert Counter(sweep["state"] for sweep in sweeps) == {"succeeded": NUM_SWEEPS}
    starts = Counter((service.home / "starts.txt").read_text().splitlines())
    assert starts == {f"{sweep['id']} 1": 1 for sweep in sweeps}
    for sweep in sweeps:
        events = list(read(Paths(service.home).sweep(sweep["id"]).ledger))
        kinds = Counter(event["event"] for event in events)
        assert kinds["sweep_finished"] == kinds["sweep_started"] == 1
        progress = sweep["progress"]
        assert progress["trainings_done"] == progress["trainings_total"] == 2
        assert progress["finals_done"] == kinds["final_scored"] == progress["finals_total"]


def wait_for_all(service: Service) -> list[dict[str, Any]]:
    deadline = time.monotonic() + END_S
    while True:
        with Client(service.address, timeout_s=START_S) as client:
            sweeps = list(client.sweeps())
        if len(sweeps) == NUM_SWEEPS and all(s["ended_at"] is not None for s in sweeps):
            return sweeps
        assert time.monotonic() < deadline, [(s["id"], s["state"], s["reason"]) for s in sweeps]
        time.sleep(0.5)
