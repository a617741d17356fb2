"""`fairway serve`, `token` and `quota` as processes of their own, on a real home."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import typer
from typer.testing import CliRunner, Result

from service import cli_serve
from service.api.lifespan import keep_running, working
from service.queue.records import Role, User
from service.states import State
from tests.dispatching import ROOT, Home, local_runner
from tests.serving import client_of, home_with, opened_service, submission
from trainer.data.shards import Dataset
from trainer.errors import UsageError

pytestmark = pytest.mark.timeout(400)

FAIRWAY = (sys.executable, "-m", "service")
APP = typer.Typer()
APP.add_typer(cli_serve.app)
APP.add_typer(cli_serve.token_app, name="token")
APP.add_typer(cli_serve.quota_app, name="quota")
PATIENCE_S = 120.0


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@dataclass(frozen=True)
class Cli:
    """`fairway` on one home."""

    home: Path

    def __call__(self, *words: str) -> Result:
        """One verb, in this process."""
        return CliRunner().invoke(APP, [*words, "--home", str(self.home)])

    def refusal(self, *words: str) -> str:
        """The line with which a verb refuses what it is given, before it does anything."""
        error = self(*words).exception
        assert isinstance(error, UsageError)
        assert error.exit_code == 2
        assert len(str(error).splitlines()) == 1
        return str(error)

    @contextmanager
    def serving(self, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
        """A service that listens, and its address; killed at the end if it still runs."""
        log = self.home / "serve.log"
        log.unlink(missing_ok=True)
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [*FAIRWAY, "serve", "--port", "0", "--home", str(self.home), *words],
                stderr=stderr, text=True, cwd=ROOT,
            )  # fmt: skip
        try:
            until(lambda: "listens on" in log.read_text() or process.poll() is not None)
            address = log.read_text().partition("listens on ")[2].partition(",")[0]
            yield process, address
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    def log(self) -> str:
        return (self.home / "serve.log").read_text()


@pytest.fixture
def cli(tmp_path: Path, tiny_dataset: Dataset) -> Cli:
    return Cli(home_with(tmp_path, tiny_dataset))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_serves_and_leaves_cleanly(cli: Cli, number: signal.Signals):
    with cli.serving() as (process, address):
        assert "everybody on this machine is its admin" in cli.log()
        secret = cli("token", "create", "ada", "--role", "admin").stdout.strip()
        with httpx2.Client(
            base_url=f"{address}/api/v1", trust_env=False, timeout=PATIENCE_S
        ) as client:
            assert client.get("/me").status_code == 401
            client.headers["Authorization"] = f"Bearer {secret}"
            assert client.get("/me").json()["user"] == "ada"
            made = client.post("/sweeps:validate", json=submission())
            assert made.status_code == 200
            ready = client.get("/readyz").json()
            assert ready["database"]["ok"]
            assert ready["jobs"]["ok"]
            until(lambda: "tick_age_seconds" in client.get("/metrics").text)
        process.send_signal(number)

        assert process.wait(timeout=PATIENCE_S) == 0
    log = cli.log()
    assert "fairway has ended; sweeps that run go on" in log
    assert "Traceback" not in log
    assert secret not in log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    [validated] = [line for line in lines if line.get("path") == "/api/v1/sweeps:validate"]
    assert (validated["status"], validated["user"]) == (200, "ada")


def test_what_cannot_be_served_is_refused_in_a_line(cli: Cli, tmp_path: Path):
    def refusal(*words: str) -> str:
        return cli.refusal("serve", "--port", "0", *words)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "cannot be listened on" in cli.refusal("serve", "--port", port)
    with opened_service(cli.home):
        assert "another service runs on this home" in refusal()
    assert "fairway token create" in refusal("--host", "0.0.0.0")
    assert "no such folder" in refusal("--root", str(tmp_path / "none"))
    assert "not a readable text file" in refusal("--webhook-secret-file", str(tmp_path / "none"))
    assert "https://" in refusal("--webhook", "file:///etc/passwd")
    assert "hunter2" not in refusal("--database-url", "mysql://a:hunter2@h/x")


def test_a_port_that_is_taken_ends_the_process_with_2_and_a_line(cli: Cli):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = subprocess.run(
            [*FAIRWAY, "serve", "--home", str(cli.home), "--port", str(taken.getsockname()[1])],
            capture_output=True, text=True, timeout=PATIENCE_S, cwd=ROOT,
        )  # fmt: skip

    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1


def test_tokens_are_made_listed_and_revoked_and_kept_as_hashes_only(cli: Cli):
    made = cli("token", "create", "ada", "--role", "admin", "--days", "30", "--note", "laptop")
    secret = made.stdout.strip()
    listed = cli("token", "ls", "-o", "json")

    assert secret.startswith("fwy_")
    assert secret not in made.stderr
    assert secret not in listed.stdout
    [row] = json.loads(listed.stdout)
    assert (row["user"], row["role"], row["note"], row["active"]) == (
        "ada",
        "admin",
        "laptop",
        True,
    )
    assert all(secret.encode() not in path.read_bytes() for path in cli.home.glob("service.db*"))

    revoked = cli("token", "revoke", str(row["id"]))

    assert revoked.exit_code == 0
    [row] = json.loads(cli("token", "ls", "-o", "json").stdout)
    assert not row["active"]
    assert "no token 99" in cli.refusal("token", "revoke", "99")
    assert "no good" in cli.refusal("token", "create", "no good")


def test_quotas_are_set_and_listed(cli: Cli):
    cli("quota", "set", "sam", "--gangs", "2", "--gpu-hours", "10", "--max-priority", "5")
    cli("quota", "set", "sam", "--gangs", "3")

    [row] = json.loads(cli("quota", "ls", "-o", "json").stdout)

    assert (row["user"], row["max_gangs"], row["gpu_hours"]) == ("sam", 3, None)
    assert (row["gangs_held"], row["gpu_hours_used"], row["max_priority"]) == (0, 0.0, 10)
    assert "window_days" in cli.refusal("quota", "set", "sam", "--window-days", "0")


def test_a_sweep_that_runs_outlives_the_service_and_the_next_one_takes_it_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    home = Home(tmp_path / "home")
    home.submit("long", holds=["training"])
    try:
        with opened_service(home.paths.home, runner=local_runner()) as services:
            with working(services):
                until(lambda: home.state("long") == State.RUNNING)
            begun = home.files("long").begun()
            assert begun is not None
            os.kill(begun.pid, 0)  # it is there
        assert home.state("long") == State.RUNNING
        home.let_go("training")
        until(lambda: home.ledger_state("long") == State.SUCCEEDED)

        with opened_service(home.paths.home, runner=local_runner()) as services, working(services):
            until(lambda: home.state("long") == State.SUCCEEDED)
            with client_of(services) as client:
                shown = client.get("/api/v1/sweeps/long").json()

        assert (shown["state"], shown["attempt"]) == ("succeeded", 1)
        assert home.starts() == {("long", 1): 1}
    finally:
        home.close()


def test_a_cancel_over_http_ends_a_sweep_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    home = Home(tmp_path / "home")
    home.submit("long", seconds=60.0, user=User("local", Role.ADMIN))
    try:
        with (
            opened_service(home.paths.home, runner=local_runner()) as services,
            working(services),
            client_of(services) as client,
        ):
            until(lambda: home.state("long") == State.RUNNING)
            asked = client.post("/api/v1/sweeps/long:cancel").json()
            assert asked["want"] == "cancel"
            until(lambda: client.get("/api/v1/sweeps/long").json()["state"] == "cancelled")
            shown = client.get("/api/v1/sweeps/long").json()
    finally:
        home.close()

    assert shown["reason"] == "cancelled by local"
    assert shown["gangs_held"] == 0


def test_mlflows_address_is_on_no_command_line(tmp_path: Path):
    uri = "http://ada:hunter2@127.0.0.1:9"
    with (
        opened_service(tmp_path / "home", runner=local_runner(), tracking_uri=uri) as services,
        working(services),
    ):
        told = services.paths.outbox
        until(told.is_file)
        [child] = [
            words
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if str(services.paths.home).encode() in (words := read_or_nothing(path))
            and b"service.outbox" in words
        ]

    assert b"hunter2" not in child
    assert json.loads(told.read_text())["uri"].endswith("127.0.0.1:9")


def read_or_nothing(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""


def test_a_process_beside_the_service_is_started_again_when_it_dies_and_ended_with_it(
    tmp_path: Path,
):
    starts = tmp_path / "starts.txt"
    script = f"""
import os, time
with open({str(starts)!r}, "a") as file:
    file.write(f"{{os.getpid()}} ")
time.sleep(600)
"""
    stop = threading.Event()
    keeper = threading.Thread(target=keep_running, args=([sys.executable, "-c", script], stop))
    keeper.start()

    def pids() -> list[int]:
        return [int(pid) for pid in starts.read_text().split()] if starts.is_file() else []

    until(lambda: len(pids()) == 1)
    os.kill(pids()[0], signal.SIGKILL)
    until(lambda: len(pids()) == 2)
    stop.set()
    keeper.join()

    with pytest.raises(ProcessLookupError):
        os.kill(pids()[1], 0)
