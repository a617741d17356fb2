"""Notices on their way to real receivers that fail, hang and die; their sender is killed too."""

import hashlib
import hmac
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from service.ledger import SweepView, read
from service.notices import GIVE_UP_S, Notice, Notices, Told, notices_of
from service.paths import Paths
from service.queue.database import default_url, open_database
from service.queue.deliveries import Deliveries
from service.queue.queue import Queue
from service.queue.records import Summary, SweepRecord, Verb
from service.states import State
from service.tails import Tails
from tests.ledgers import CLIP, EMA, PRUNE, START, WARMDOWN, Sweep
from tests.ports import free_port
from tests.queues import ANN, new_sweep

PATIENCE_S = 240.0
MANY = {WARMDOWN: [2500], EMA: [0.997], CLIP: ["none", "p5"], PRUNE: [0.0, 0.03, 0.06, 0.1]}
NOTIFIER = """
import logging, sys, threading
from pathlib import Path
from service.notices import Notices
from service.paths import Paths
from service.queue.database import default_url, open_database
from service.queue.deliveries import Deliveries
from service.queue.queue import Queue
from service.tails import Tails
logging.basicConfig()
paths = Paths(Path(sys.argv[1]))
engine = open_database(default_url(paths))
parts = Queue(engine), Deliveries(engine), Tails(paths)
Notices(paths, *parts, sys.argv[2:], "secret").run_forever(threading.Event())
"""


@dataclass
class Receiver:
    """A webhook of its own port. `answer` decides over each post: a status, or None for hanging up
    after the notice has been taken in."""

    answer: Callable[[dict[str, Any]], int | None] = lambda body: 204
    port: int = field(default_factory=free_port)
    posts: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    """Path, headers and body of everything that was taken in, in order."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(content) for _, _, content in self.posts]

    @contextmanager
    def running(self) -> Iterator[None]:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                status = receiver.answer(json.loads(content))
                if status is None or status < 300:
                    receiver.posts.append((self.path, dict(self.headers.items()), content))
                if status is not None:
                    self.send_response(status)
                    self.send_header("Location", f"http://127.0.0.1:{receiver.port}/elsewhere")
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        with ThreadingHTTPServer(("127.0.0.1", self.port), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.05,))
            thread.start()
            try:
                yield
            finally:
                server.shutdown()
                thread.join()


@dataclass
class Home:
    """A Fairway home with the database of its service."""

    paths: Paths
    engine: sqlalchemy.Engine

    def notices(self, *webhooks: str, secret: str | None = None) -> Notices:
        """A sender that knows nothing but what is on disk."""
        parts = Queue(self.engine), Deliveries(self.engine), Tails(self.paths)
        return Notices(self.paths, *parts, webhooks, secret)

    @property
    def queue(self) -> Queue:
        return Queue(self.engine)

    def claimed(self, sweep_id: str) -> SweepRecord:
        """A sweep of the queue whose attempt is under way."""
        self.queue.submit(new_sweep(sweep_id, sweep_id=sweep_id), ANN)
        return self.attempt(sweep_id)

    def attempt(self, sweep_id: str) -> SweepRecord:
        record = self.queue.claim(sweep_id, 1)
        assert record is not None
        return record

    def end(self, record: SweepRecord, state: State, reason: str | None = None) -> None:
        """Tell the queue that an attempt is over, with what the ledger has by then."""
        ledger = self.paths.sweep(record.sweep_id).ledger
        num_events = len(list(read(ledger))) if ledger.is_file() else 0
        summary = Summary(num_events=num_events)
        assert self.queue.advance(record, state=state, reason=reason, summary=summary)

    def sweep(self, sweep_id: str = "told-1", *, seed: int = 1337) -> Sweep:
        """A sweep that begins now."""
        sweep = Sweep(self.paths.home, sweep_id, mean_bytes=15_000_000, seed=seed, space=MANY)
        sweep.tick(time.time() - START)
        return sweep

    def num_waiting(self) -> int:
        return Deliveries(self.engine).num_waiting()


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    engine = open_database(default_url(Paths(tmp_path)))
    yield Home(Paths(tmp_path), engine)
    engine.dispose()


def expected(sweep: Sweep) -> list[Notice]:
    view, told, found = SweepView(), Told(), list[Notice]()
    for event in read(sweep.paths.sweep(sweep.sweep_id).ledger):
        view.apply(event)
        new, told = notices_of(view, event, told)
        found += new
    return found


def write_slowly(sweep: Sweep, pause_s: float) -> None:
    (point,) = sweep.train_points()
    with sweep.open() as writer:
        sweep.start(writer)
        sweep.train(writer, point)
        for number, final_point in enumerate(sweep.final_points(point)):
            time.sleep(pause_s)
            if number % 2:
                sweep.score(writer, final_point, state="illegal", reason="audit")
            else:
                sweep.score(writer, final_point)
        sweep.finish(writer)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s"
        time.sleep(0.05)


def without_repeats(bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a receiver keeps that drops known ids; the same id may not come with another body."""
    kept: dict[str, dict[str, Any]] = {}
    for body in bodies:
        assert kept.setdefault(body["id"], body) == body
    return list(kept.values())


def test_each_notice_arrives_once_and_in_order_though_everybody_dies_on_the_way(
    home: Home,
) -> None:
    chance = random.Random(7)
    troubles = [500, None, 503, 302]

    def answer(body: dict[str, Any]) -> int | None:
        time.sleep(0.02)
        return troubles.pop() if troubles and chance.random() < 0.3 else 204

    receiver = Receiver(answer)
    sweeps = [home.sweep("told-1"), home.sweep("told-2", seed=42)]
    writers = [threading.Thread(target=write_slowly, args=(sweep, 0.7)) for sweep in sweeps]
    command = [sys.executable, "-c", NOTIFIER, str(home.paths.home), receiver.url]
    for writer in writers:
        writer.start()
    for num_posts in (1, 3, 6):
        sender = subprocess.Popen(command)
        with receiver.running():
            until(lambda least=num_posts: len(receiver.posts) >= least)
            time.sleep(chance.uniform(0.0, 0.1))
            sender.kill()
            sender.wait()
    sender = subprocess.Popen(command)
    time.sleep(1.0)  # nobody listens
    try:
        with receiver.running():
            for writer in writers:
                writer.join()
            num_expected = sum(len(expected(sweep)) for sweep in sweeps)
            until(lambda: len(without_repeats(receiver.bodies)) >= num_expected)
            until(lambda: home.num_waiting() == 0)
    finally:
        sender.kill()
        sender.wait()

    kept = without_repeats(receiver.bodies)
    for sweep in sweeps:
        mine = [body for body in kept if body["sweep"] == sweep.sweep_id]
        assert [(b["kind"], b["at"], b["text"]) for b in mine] == [
            (notice.kind, notice.at, notice.text) for notice in expected(sweep)
        ]
    assert len(kept) == num_expected


def test_a_post_is_signed_and_carries_its_id(home: Home) -> None:
    receiver = Receiver()
    home.sweep().write()

    with receiver.running():
        home.notices(receiver.url, secret="hush").step()

    for path, headers, content in receiver.posts:
        digest = hmac.new(b"hush", content, hashlib.sha256).hexdigest()
        assert headers["Fairway-Signature"] == f"sha256={digest}"
        assert headers["Fairway-Delivery"] == json.loads(content)["id"]
        assert path == "/hook"
    last = receiver.bodies[-1]
    assert set(last) == {"id", "kind", "sweep", "at", "text", "facts"}
    assert (last["kind"], last["facts"]["state"]) == ("done", "succeeded")
    assert home.num_waiting() == 0


def test_a_service_that_starts_again_tells_nothing_twice(home: Home) -> None:
    receiver = Receiver()
    home.sweep().write()

    with receiver.running():
        home.notices(receiver.url).step()
        num_first = len(receiver.posts)
        home.notices(receiver.url).step()
        with home.sweep().open() as writer:
            home.sweep().finish(writer, "cancelled")
        home.notices(receiver.url).step()

    assert num_first == len(expected(home.sweep())) - 1
    assert len(receiver.posts) == num_first + 1
    assert receiver.bodies[-1]["facts"]["state"] == "cancelled"


def test_a_redirect_is_a_failure_and_is_not_followed(home: Home) -> None:
    receiver = Receiver(lambda body: 307)
    home.sweep().write()

    with receiver.running():
        home.notices(receiver.url).step()

    (first, *_) = Deliveries(home.engine).due(time.time() + 60)
    assert first.error == "answered 307"
    assert receiver.posts == []


def test_a_receiver_that_hangs_delays_neither_another_nor_the_end(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.notices.TIMEOUT_S", 4 * PATIENCE_S)  # nobody waits that long
    receiver, stop = Receiver(), threading.Event()
    home.sweep().write()
    num_expected = len(expected(home.sweep()))
    with socket.create_server(("127.0.0.1", 0)) as hanging, receiver.running():
        url = f"http://127.0.0.1:{hanging.getsockname()[1]}"
        notices = home.notices(url, receiver.url)
        sender = threading.Thread(target=notices.run_forever, args=(stop,))
        sender.start()
        connection, _ = hanging.accept()
        until(lambda: len(receiver.posts) == num_expected)
        stop.set()
        sender.join(PATIENCE_S)
        is_over = not sender.is_alive()
        connection.close()

    assert is_over


def test_after_a_day_a_notice_is_given_up_and_the_next_ones_follow(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    receiver = Receiver(lambda body: 500 if body["kind"] == "new_best" else 204)
    home.sweep().write()
    notices = home.notices(receiver.url)
    notices.collect()
    with home.engine.begin() as db:
        db.exec_driver_sql(f"UPDATE deliveries SET created_at = created_at - {GIVE_UP_S + 60}")

    with receiver.running():
        notices.step()

    assert [body["kind"] for body in receiver.bodies] == ["done"]
    assert "new_best to 127.0.0.1: given up after a day: answered 500" in caplog.text
    assert home.num_waiting() == 0


def test_what_happened_long_ago_is_not_told(home: Home) -> None:
    Sweep(home.paths.home, sweep_id="old-1", space=MANY).write()
    Sweep(home.paths.home, sweep_id="old-2", space=MANY).write()

    home.notices("http://127.0.0.1:9/hook").step()

    assert home.num_waiting() == 0


def test_a_webhook_that_left_the_settings_is_called_no_more(home: Home) -> None:
    gone, kept = Receiver(), Receiver()
    home.sweep().write()
    home.notices(gone.url).collect()

    with gone.running(), kept.running():
        home.notices(kept.url).step()

    assert gone.posts == []
    assert home.num_waiting() == 0


def test_with_no_webhook_left_nothing_waits(home: Home) -> None:
    stop = threading.Event()
    home.sweep().write()
    home.notices("http://127.0.0.1:9/gone").collect()
    before = home.num_waiting()

    sender = threading.Thread(target=home.notices().run_forever, args=(stop,))
    sender.start()
    try:
        until(lambda: home.num_waiting() == 0)
    finally:
        stop.set()
        sender.join()

    assert before > 0


def test_a_sweep_whose_notices_are_stuck_hides_no_other(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.notices._MOST_ROWS", 2)
    receiver = Receiver(lambda body: 500 if body["sweep"] == "stuck-1" else 204)
    home.sweep("stuck-1").write()
    home.notices(receiver.url).collect()
    home.sweep("told-1").write()
    num_stuck = home.num_waiting()

    with receiver.running():
        home.notices(receiver.url).step()

    assert num_stuck > 2
    assert [body["kind"] for body in receiver.bodies][-1] == "done"
    assert {body["sweep"] for body in receiver.bodies} == {"told-1"}
    assert home.num_waiting() == num_stuck


def test_an_end_of_which_the_ledger_says_nothing_is_told_from_the_queue(home: Home) -> None:
    receiver = Receiver()
    started = {name: home.claimed(name) for name in ("lost-1", "unborn-1", "killed-1")}
    for name in ("lost-1", "killed-1"):
        sweep = home.sweep(name)
        with sweep.open() as writer:
            sweep.start(writer)
            sweep.score(writer, sweep.final_points(sweep.train_points()[0])[0])
    home.queue.submit(new_sweep("waits-1", sweep_id="waits-1"), ANN)

    home.end(started["lost-1"], State.LOST, "its job was lost 3 times")
    home.end(started["unborn-1"], State.FAILED, "sweep.yaml: no such knob")
    home.queue.ask("killed-1", Verb.CANCEL, ANN)
    home.end(started["killed-1"], State.CANCELLED, "cancelled by ann")
    home.queue.ask("waits-1", Verb.CANCEL, ANN)
    with receiver.running():
        home.notices(receiver.url).step()
        home.notices(receiver.url).step()

    done = {body["sweep"]: body for body in receiver.bodies if body["kind"] == "done"}
    assert len(receiver.bodies) == len(done) + 2  # the best of the two that scored something
    assert [body["kind"] for body in receiver.bodies if body["sweep"] == "lost-1"][-1] == "done"
    assert {name: body["text"].partition("; ")[0] for name, body in done.items()} == {
        "lost-1": "lost-1: lost: its job was lost 3 times",
        "unborn-1": "unborn-1: failed: sweep.yaml: no such knob",
        "killed-1": "killed-1: cancelled: cancelled by ann",
        "waits-1": "waits-1: cancelled: cancelled by ann",
    }
    assert done["lost-1"]["facts"]["best"]["val_bpb"] > 1.0
    assert done["unborn-1"]["facts"]["best"] is None


def test_an_end_is_told_once_though_both_ledger_and_queue_tell_of_it(home: Home) -> None:
    receiver, sweep = Receiver(), home.sweep()
    notices = home.notices(receiver.url)

    def finish(state: str, **facts: Any) -> None:
        with sweep.open() as writer:
            sweep.start(writer)
            writer.append("sweep_finished", at=time.time(), state=state, cache_hits=0, **facts)

    with receiver.running():
        first = home.claimed("told-1")
        finish("stopped", reason="its budget is spent")
        home.end(first, State.STOPPED, "its budget is spent")
        notices.step()
        home.queue.ask("told-1", Verb.RESUME, ANN)
        home.queue.ask("told-1", Verb.STOP, ANN)  # before it was started again
        notices.step()
        home.queue.ask("told-1", Verb.RESUME, ANN)
        second = home.attempt("told-1")
        finish("stopped", reason="paused by ann", order="pause")
        home.end(second, State.PAUSED, "paused by ann")
        notices.step()
        home.queue.ask("told-1", Verb.CANCEL, ANN)
        notices.step()
        home.queue.ask("told-1", Verb.RESUME, ANN)
        home.end(home.attempt("told-1"), State.FAILED, "no such knob")
        home.notices(receiver.url).step()

    assert [body["text"].partition(": ")[2] for body in receiver.bodies] == [
        "stopped: its budget is spent",
        "stopped: stopped by ann",
        "cancelled: cancelled by ann",
        "failed: no such knob",
    ]


def test_one_damaged_ledger_keeps_no_other_sweep_from_being_told(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    receiver = Receiver()
    home.sweep("damaged-1").write()
    home.sweep("sound-1").write()
    path = home.paths.sweep("damaged-1").ledger
    path.write_bytes(path.read_bytes().replace(b'"cached":false', b'"cached":0', 1))

    with receiver.running():
        home.notices(receiver.url).step()

    assert {body["sweep"] for body in receiver.bodies} == {"sound-1"}
    assert "line 3 is damaged" in caplog.text


def test_the_address_of_a_webhook_is_in_no_log(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    home.sweep().write()

    with caplog.at_level("DEBUG", logger="httpx2"), caplog.at_level("INFO"):
        home.notices(f"http://127.0.0.1:{free_port()}/canary-path").step()

    assert "next try in" in caplog.text
    assert "canary-path" not in caplog.text
