"""Two users and a reader share a service through the command line, as from their own laptops.

The service is whole; a sweep's work is done by tests.quick_job: real plans, ids and ledgers.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from service.api.services import Services
from service.client import Client
from service.jobs import dispatcher
from service.jobs.dispatcher import Patience
from service.jobs.local import LocalRunner
from service.queue.records import Quota
from tests.serving import home_with, opened_service, served, submission, token
from trainer.data.shards import Dataset

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 240.0


@dataclass(frozen=True)
class Laptop:
    """A user's command line, in a folder of their own."""

    folder: Path
    server: str
    token: str | None

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a verb; the environment says which server and who we are."""
        own = {"FAIRWAY_SERVER": self.server, "NO_COLOR": "1"}
        if self.token is not None:
            own["FAIRWAY_TOKEN"] = self.token
        return subprocess.run(
            [sys.executable, "-m", "service", *words],
            cwd=self.folder,
            env={**os.environ, **own},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )

    def json(self, *words: str) -> Any:
        """Run a verb that must succeed and read what it prints."""
        done = self(*words, "-o", "json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def file(self, name: str, tenths: int = 1, **changes: Any) -> str:
        """A sweep file and its recipe in this laptop's folder. `tenths` of a second: what one of
        its trainings takes."""
        body = submission(name=name, limits={"infra_retries": tenths}, **changes)
        (self.folder / f"{name}.yaml").write_text(body["sweep"])
        for recipe, text in body["files"].items():
            (self.folder / recipe).write_text(text)
        return f"{name}.yaml"


@dataclass(frozen=True)
class Office:
    """A service with one gang, and who uses it."""

    services: Services
    alice: Laptop
    bob: Laptop
    rita: Laptop
    stranger: Laptop

    def hold(self, name: str) -> None:
        """Keep the sweep of this name from finishing anything, until it is let go."""
        self._held(name).touch()

    def let_go(self, name: str) -> None:
        self._held(name).unlink()

    def _held(self, name: str) -> Path:
        return self.services.paths.home / f"hold-{name}"

    def wait_for(self, sweep_id: str, *states: str) -> dict[str, Any]:
        """Wait until a sweep is in one of these states."""
        deadline = time.monotonic() + PATIENCE_S
        with Client(self.rita.server, self.rita.token) as client:
            while (sweep := client.sweep(sweep_id))["state"] not in states:
                assert time.monotonic() < deadline, sweep
                time.sleep(0.1)
        return sweep


@pytest.fixture
def office(
    tmp_path: Path, tiny_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Office]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(dispatcher, "TICK_S", 0.1)
    runner = LocalRunner(program=(sys.executable, "-m", "tests.quick_job"))
    with opened_service(home_with(tmp_path, tiny_dataset), runner=runner) as services:
        secrets = {
            user: token(services, user, role)["Authorization"].removeprefix("Bearer ")
            for user, role in (("alice", "submitter"), ("bob", "submitter"), ("rita", "reader"))
        }
        with dispatching(services), served(services) as http:
            server = str(http.base_url)

            def laptop(name: str, secret: str | None) -> Laptop:
                (tmp_path / name).mkdir()
                return Laptop(tmp_path / name, server, secret)

            users = {user: laptop(user, secret) for user, secret in secrets.items()}
            yield Office(services, **users, stranger=laptop("stranger", None))


@contextmanager
def dispatching(services: Services) -> Iterator[None]:
    assert services.dispatcher is not None
    services.dispatcher.patience = Patience(cancel_s=PATIENCE_S, finish_s=PATIENCE_S)
    thread = threading.Thread(target=services.dispatcher.run_forever, args=(services.stopping,))
    thread.start()
    try:
        yield
    finally:
        services.stopping.set()
        thread.join()


def started(office: Office) -> list[str]:
    """The ids of the sweeps in the order in which they were started."""
    path = office.services.paths.home / "starts.txt"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def test_sweeps_run_by_priority_then_by_turns_and_one_gang_at_a_time(office: Office) -> None:
    alice, bob = office.alice, office.bob
    office.hold("first")
    first = alice.json("submit", alice.file("first"))["id"]
    office.wait_for(first, "starting", "running")
    again = alice.json("submit", alice.file("second"))["id"]
    others = bob.json("submit", bob.file("third"))["id"]
    urgent = alice.json("submit", alice.file("fourth"), "--priority", "5")["id"]

    waiting = office.wait_for(again, "waiting")
    office.let_go("first")
    for sweep in (first, again, others, urgent):
        office.wait_for(sweep, "succeeded")

    assert waiting["reason"] in (  # which of them depends on who had come by then
        "1 of 1 gangs are in use",
        "others are ahead, which need more gangs than are free",
    )
    # Bob, who holds nothing and has used nothing, goes before alice's next.
    assert started(office) == [first, urgent, others, again]


def test_a_user_over_their_quota_waits_and_holds_up_nobody(office: Office) -> None:
    office.services.quotas.put(Quota("alice", max_gangs=0))
    alice, bob = office.alice, office.bob

    held = alice.json("submit", alice.file("held"))["id"]
    free = bob.json("submit", bob.file("free"))["id"]
    office.wait_for(free, "succeeded")
    waiting = office.wait_for(held, "waiting")
    office.services.quotas.put(Quota("alice"))
    office.wait_for(held, "succeeded")

    assert waiting["reason"] == "alice holds 0 of 0 gangs"
    assert started(office) == [free, held]


def test_the_same_request_is_the_same_sweep_whoever_sends_it(office: Office) -> None:
    alice, bob = office.alice, office.bob

    sent = alice.json("submit", alice.file("shared"), "--key", "monday")
    again = alice.json("submit", alice.file("shared"), "--key", "monday")
    others = bob.json("submit", bob.file("shared"))
    other = alice("submit", alice.file("shared", tenths=2), "--key", "monday")
    office.wait_for(sent["id"], "succeeded")

    assert sent["id"] == again["id"] == others["id"]
    assert others["owner"] == "alice"
    assert other.returncode == 2
    assert "idempotency key 'monday' was used for another request" in other.stderr
    assert started(office) == [sent["id"]]


def test_who_has_no_valid_token_is_told_so_and_a_reader_cannot_cancel(office: Office) -> None:
    office.hold("guarded")
    sweep = office.alice.json("submit", office.alice.file("guarded"))["id"]

    nobody = office.stranger("ls")
    forged = Laptop(office.stranger.folder, office.stranger.server, "fwy_" + "x" * 43)("ls")
    reader = office.rita("cancel", sweep)
    stranger = office.bob("cancel", sweep)
    owner = office.alice("cancel", sweep)

    for refused, words in (
        (nobody, "a token is needed"),
        (forged, "the token is not valid"),
        (reader, "rita is a reader; this needs a submitter's token"),
        (stranger, "is alice's; cancel needs their token"),
    ):
        assert refused.returncode == 2
        assert words in refused.stderr
        assert refused.stderr.count("\n") == 1
    assert owner.returncode == 0, owner.stderr
    assert office.wait_for(sweep, "cancelled")["reason"] == "cancelled by alice"
    noted = {(row["user"], row["outcome"][:3]) for row in office.services.queue.audit_log()}
    assert {("rita", "403"), ("bob", "403"), ("alice", "don")} <= noted


def test_a_paused_sweep_goes_on_where_it_was_and_its_exit_code_tells(office: Office) -> None:
    alice = office.alice
    path = alice.file("paused")
    office.hold("paused")
    sweep = alice.json("submit", path)["id"]
    office.wait_for(sweep, "running")

    alice("pause", sweep)
    paused = office.wait_for(sweep, "paused")
    watched = alice("submit", path, "--wait")
    office.let_go("paused")
    alice("resume", sweep)
    done = alice("submit", path, "--wait")

    assert paused["reason"] == "paused by alice"
    assert watched.returncode == 130
    assert f"`fairway resume {sweep}` goes on" in watched.stderr
    assert done.returncode == 0, done.stderr
    assert office.rita.json("best", sweep)["val_bpb"] > 0
    assert started(office) == [sweep, sweep]
    assert "event=attempt number=2" in office.rita("logs", sweep, "-f").stdout


def test_a_dry_run_says_what_it_costs_and_queues_nothing(office: Office) -> None:
    said = office.alice.json("submit", office.alice.file("planned"), "--dry-run")

    assert (said["plan"]["trainings"], said["known"]) == (2, False)
    assert office.rita.json("ls") == []


def test_the_python_client_follows_a_sweep_to_its_end(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice = office.alice
    monkeypatch.chdir(alice.folder)
    with Client(alice.server, alice.token) as fairway:
        sweep = fairway.submit(alice.file("followed"))
        events = list(fairway.events(sweep["id"]))
        half = events[len(events) // 2]
        rest = list(fairway.events(sweep["id"], after=half.id))
        sweep = fairway.wait(sweep["id"])
        finals = list(fairway.finals(sweep["id"]))

    assert sweep["state"] == "succeeded"
    assert rest == events[len(events) // 2 + 1 :]
    seqs = [event.data["seq"] for event in events if event.name == "ledger"]
    assert seqs == list(range(1, len(seqs) + 1))
    assert events[-1].name == "end"
    assert sweep["best"]["final"] == finals[0]["final"]
    assert len(finals) == sweep["progress"]["finals_total"]


def test_a_service_that_is_not_there_is_told_in_one_line_with_exit_5(tmp_path: Path) -> None:
    done = Laptop(tmp_path, "http://127.0.0.1:9", None)("ls")

    assert done.returncode == 5
    assert done.stderr.count("\n") == 1
    assert "`fairway serve` starts one" in done.stderr
