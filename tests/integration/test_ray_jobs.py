"""Jobs of a real Ray cluster with tokens: they outlive the service, which finds them again."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest

from service.control import write_order
from service.jobs.ray_jobs import RayJobRunner
from service.jobs.runner import Job, JobState
from service.states import State
from tests import patient_ray
from tests.dispatching import ROOT, Home, ask_ray, set_environment, wait_until
from tests.integration.test_engine_kills import below
from tests.ports import free_port
from trainer.errors import BackendError, UsageError

pytestmark = pytest.mark.timeout(1_200)

TOKEN = "a-token-of-this-test-and-of-no-other-cluster-0123456789"
START_S = 240.0
"""Ray starts slowly where the cores are busy with other work."""


@dataclass(frozen=True)
class Head:
    """A head with token authentication, and what a client of it has in its environment."""

    process: subprocess.Popen[bytes]
    address: str
    environment: dict[str, str]
    log: Path

    def end(self) -> None:
        """As when its machine fails."""
        if self.process.poll() is None:
            for pid in [*below(self.process.pid), self.process.pid]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue  # went with its parent
        self.process.wait()


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """One head for all tests; the last of them ends it."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # short, for the names of sockets
        for _ in range(3):  # Ray gives its own parts 30 s, which a busy machine may not keep to
            head = begin(Path(folder))
            try:
                if has_started(head):
                    yield head
                    return
            finally:
                head.end()
        pytest.fail(head.log.read_text())


def begin(folder: Path) -> Head:
    dashboard, *ports = (free_port() for _ in range(6))
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    environment |= {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(folder)}
    words = ["start", "--head", "--block", "--disable-usage-stats", f"--temp-dir={folder}"]
    words += ["--num-cpus=1", "--object-store-memory=80000000", "--include-log-monitor=false"]
    words += ["--port=0", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    # Those that are not given the raylet waits for.
    parts = ("ray-client-server", "dashboard-agent-listen", "dashboard-agent-grpc")
    parts += ("metrics-export", "runtime-env-agent")
    words += [f"--{part}-port={port}" for part, port in zip(parts, ports, strict=True)]
    script = str(Path(sys.executable).with_name("ray"))
    said = folder / "head.log"
    with said.open("wb") as log:
        process = subprocess.Popen([script, *words], env=environment, stdout=log, stderr=log)
    return Head(process, f"http://127.0.0.1:{dashboard}", environment, said)


def has_started(head: Head) -> bool:
    wait_until(
        lambda: "Ray runtime started" in head.log.read_text() or head.process.poll() is not None,
        START_S,
    )
    return head.process.poll() is None


class Service:
    """A process of the service, which knows no more than where the head is."""

    def __init__(self, head: Head, **environment: str) -> None:
        self._head = head
        self._variables = {
            name: head.environment[name]
            for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_TMPDIR", "PYTHONPATH")
        } | environment

    def __enter__(self) -> "Service":
        # Ray reads its token's variables once, when it is imported.
        self._pool = ProcessPoolExecutor(
            1,
            get_context("spawn"),
            initializer=patient_ray.begin,
            initargs=(self._variables, self._head.address),
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def check(self) -> None:
        self._pool.submit(ask_ray, self._head.address, "check").result()

    def start(self, job: Job) -> None:
        self._pool.submit(ask_ray, self._head.address, "start", job).result()

    def state(self, job: Job) -> JobState:
        return self._pool.submit(ask_ray, self._head.address, "state", job).result()

    def stop(self, job: Job) -> None:
        self._pool.submit(ask_ray, self._head.address, "stop", job).result()


@pytest.fixture(scope="module")
def service(head: Head) -> Iterator[Service]:
    with Service(head, RAY_ADDRESS="127.0.0.1:1") as service:  # another than it is told
        yield service


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path / "home")
    yield home
    home.close()


def test_a_job_outlives_the_service_and_is_found_again(head: Head, service: Service, home: Home):
    home.submit("one", seconds=900)
    job = home.job("one")
    with Service(head) as first:
        assert first.state(job).phase == "absent"
        first.start(job)
        assert first.state(job).phase == "running"
        first.start(job)  # an answer that was lost: asked again
        wait_until(lambda: home.starts() != {}, START_S)

    assert service.state(job).phase == "running"
    write_order(job.sweep, "stop", "alice")
    wait_until(lambda: service.state(job).phase == "ended")
    service.start(job)
    assert service.state(job) == JobState("ended", 130, "ended with exit code 130")
    assert home.starts() == {("one", 1): 1}
    assert home.log("one").startswith("event=attempt number=1\n")


def test_a_job_that_is_stopped_ends_with_its_own_words(service: Service, home: Home):
    home.submit("one", seconds=900)
    job = home.job("one")
    service.start(job)
    wait_until(lambda: home.ledger_state("one") == State.RUNNING, START_S)

    service.stop(job)

    wait_until(lambda: service.state(job).phase == "ended")
    assert service.state(job).exit_code == 130
    assert home.ledger_state("one") == State.CANCELLED


def test_a_job_that_is_called_off_never_runs_on_the_cluster(service: Service, home: Home):
    home.submit("one")
    service.stop(home.job("one"))
    service.start(home.job("one"))

    assert service.state(home.job("one")).message == "stopped before it began"
    assert home.starts() == {}


def test_a_wrong_token_is_refused_and_said_so(head: Head):
    told = r"Authentication failed.*RAY_AUTH_MODE"
    with (
        Service(head, RAY_AUTH_TOKEN="wrong" * 10) as service,
        pytest.raises(BackendError, match=told),
    ):
        service.check()


def test_a_cluster_in_the_open_is_refused_without_a_token():
    told = r"set RAY_AUTH_MODE=token.*tunnel to 127\.0\.0\.1"

    with pytest.raises(UsageError, match=told):
        address_of_a_fresh_process("http://10.1.2.3:8265", {})

    for address in ("http://localhost:8265", "https://ray.example.org:443"):
        assert address_of_a_fresh_process(address, {}) == address
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    assert address_of_a_fresh_process("http://10.1.2.3:8265", token) == "http://10.1.2.3:8265"


def address_of_a_fresh_process(address: str, variables: dict[str, str]) -> str:
    """What the runner makes of an address in a process where Ray never ran."""
    with ProcessPoolExecutor(
        1,
        get_context("spawn"),
        initializer=set_environment,
        initargs=({"RAY_AUTH_MODE": "disabled"} | variables,),
    ) as pool:
        return pool.submit(checked_address, address).result()


def checked_address(address: str) -> str:
    RayJobRunner(address)
    return address


@pytest.mark.parametrize(
    "address", ["ray://10.1.2.3:10001", "auto", "127.0.0.1:8265", "http://u:secret@127.0.0.1:1/x"]
)
def test_what_is_not_the_address_of_a_dashboard_is_refused(address: str):
    with pytest.raises(UsageError, match="give it as http") as caught:
        RayJobRunner(address)

    assert "secret" not in str(caught.value)


def test_a_head_that_accepts_and_stays_silent_is_given_up_in_time():
    import ray.job_submission  # noqa: F401  # its seconds are not the head's

    with silent_port() as port:
        runner = RayJobRunner(f"http://127.0.0.1:{port}", deadline_s=4.0)
        begun = time.monotonic()

        with pytest.raises(BackendError, match="no answer in 4 s; check that the head is up"):
            runner.check()

        assert time.monotonic() - begun < START_S


@contextmanager
def silent_port() -> Iterator[int]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


def test_a_head_that_is_gone_is_out_of_reach_and_no_job_is_taken_for_lost(
    head: Head, service: Service, home: Home
):
    home.submit("one", seconds=900)
    job = home.job("one")
    service.start(job)
    wait_until(lambda: home.ledger_state("one") == State.RUNNING, START_S)

    head.end()
    wait_until(lambda: home.files("one").state().phase == "ended")

    begun = time.monotonic()
    for question in (service.check, lambda: service.state(job)):
        with pytest.raises(BackendError, match="check that the head is up"):
            question()
    assert time.monotonic() - begun < 2 * START_S
