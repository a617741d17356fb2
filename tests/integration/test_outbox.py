"""The outbox against a real MLflow: servers and processes that die, sweeps with troubles."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from service import ledger, tracking
from service.outbox import Outbox, main
from service.outbox_health import read_health
from service.paths import Paths
from service.tracking import only_projector
from tests.ledgers import CLIP, EMA, PRUNE, WARMDOWN, Sweep, curve_lines, stage_id
from tests.mlflow_server import MlflowServer, contents, runs_of
from tests.ports import free_port
from trainer.runtime.environment import quiet_mlflow
from trainer.runtime.files import read_json

quiet_mlflow()
mlflow = pytest.importorskip("mlflow")

# MLflow 3.17 uses what SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# One process imports MLflow, for all that are started and killed here.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["service.outbox", "service.plots", "mlflow"])

SMALL = {WARMDOWN: [2500], EMA: [0.997], CLIP: ["none", "p5"], PRUNE: [0.0, 0.05]}
PATIENCE_S = 300.0
NOT_A_PROCESS = 2**22 + 1  # above the kernel's highest pid


def small(home: Path, sweep_id: str) -> Sweep:
    return Sweep(home, sweep_id=sweep_id, space=SMALL)


class OutboxProcess:
    """An outbox as a process of its own; killed at the end of the `with`."""

    def __init__(self, home: Path, uri: str) -> None:
        self._words = ["--home", str(home), "--uri", uri, "--parent-pid", str(os.getpid())]

    def start(self) -> None:
        self.process = PROCESSES.Process(target=main, args=(self._words,))
        self.process.start()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def __enter__(self) -> "OutboxProcess":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An embedded store, made once; every test has a home, and a family of sweeps, of its own."""
    home = tmp_path_factory.mktemp("embedded")
    small(home, "first-1").write()
    found = tracking.default_uri(Paths(home))
    tracking.sync(Paths(home), "first-1", found)
    return found


@pytest.fixture
def client(uri: str) -> Any:
    return mlflow.MlflowClient(uri)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s"
        time.sleep(0.1)


def num_written(sweep: Sweep) -> int:
    path = sweep.paths.sweep(sweep.sweep_id).tracking
    return read_json(path)["num_events"] if path.is_file() else 0


def num_events(sweep: Sweep) -> int:
    return len(list(ledger.read(sweep.paths.sweep(sweep.sweep_id).ledger)))


def write_slowly(sweep: Sweep, pause: Callable[[], None]) -> None:
    """Write a whole sweep while it is watched; the curve grows line by line."""
    (point,) = sweep.train_points()
    key = stage_id("training", point, sweep.seed)
    with sweep.open() as writer:
        sweep.start(writer)
        sweep.begin(writer, point)
        curve = sweep.paths.store / "trainings" / key / "metrics.jsonl"
        whole = curve.read_text().splitlines(keepends=True)
        curve.write_text("")
        for first in range(0, len(whole), 10):
            with curve.open("a") as file:
                file.writelines(whole[first : first + 10])
            pause()
        sweep.end(writer, point)
        for final_point in sweep.final_points(point):
            pause()
            sweep.score(writer, final_point)
        sweep.finish(writer)


@contextmanager
def in_thread(work: Callable[[], None]) -> Iterator[None]:
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def assert_equals_the_ledger(found: dict[str, Any], sweep: Sweep) -> None:
    """One closed run a stage, every point of the curve once, one value of each final metric."""
    view = ledger.replay(sweep.paths.sweep(sweep.sweep_id).ledger)
    assert set(found) == {sweep.sweep_id, *view.trainings, *view.finals}
    assert {run["run"][1] for run in found.values()} == {"FINISHED"}
    for key in view.trainings:
        lines = (sweep.paths.store / "trainings" / key / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        wanted = {name: 0 for record in records for name in record if "/" in name}
        for record in records:
            for name in wanted:
                wanted[name] += name in record
        points = found[key]["points"]
        assert {name: len(points[name]) for name in wanted} == wanted
        assert {len(points[name]) for name in points.keys() - wanted.keys()} == {1}
    for key in view.finals:
        assert {len(points) for points in found[key]["points"].values()} == {1}
        assert "final/val_bpb" in found[key]["points"]


def test_what_mlflow_holds_equals_the_ledger_though_it_and_the_outbox_were_killed(
    tmp_path: Path,
) -> None:
    sweep = small(tmp_path, "live-1")
    is_back = threading.Event()
    pauses = iter([lambda: time.sleep(1.0)] * 4 + [lambda: is_back.wait(2 * PATIENCE_S)])

    def pause() -> None:
        next(pauses, lambda: time.sleep(0.5))()

    with MlflowServer(tmp_path) as server, OutboxProcess(tmp_path, server.uri) as outbox:
        with in_thread(lambda: write_slowly(sweep, pause)):
            try:
                until(lambda: num_written(sweep) >= 2)
                outbox.kill()
                server.kill()
                outbox.start()
                until(lambda: is_out_of_reach(sweep))
                outbox.kill()
                outbox.start()
                server.start()
            finally:
                is_back.set()
            time.sleep(1.0)
            outbox.kill()
            killed_at = time.time()
            outbox.start()
        until(lambda: num_written(sweep) == num_events(sweep))
        until(lambda: has_told_since(sweep, killed_at))  # it is up, and answers signals
        outbox.process.terminate()
        outbox.process.join(PATIENCE_S)
        assert outbox.process.exitcode == 0
        client = mlflow.MlflowClient(tracking.default_uri(sweep.paths))  # the server's own store
        caught_up = contents(client, "live-1")
        sweep.paths.sweep("live-1").tracking.unlink()
        for _ in range(2):
            tracking.sync(sweep.paths, "live-1", server.uri)
        synced = contents(client, "live-1")

    assert_equals_the_ledger(caught_up, sweep)
    assert synced == caught_up


def is_out_of_reach(sweep: Sweep) -> bool:
    health = read_health(sweep.paths)
    return health is not None and health.trouble is not None


def has_told_since(sweep: Sweep, at: float) -> bool:
    health = read_health(sweep.paths)
    return health is not None and health.at > at


def test_a_sweep_is_followed_live_and_let_go_when_it_is_over(
    tmp_path: Path, uri: str, client: Any
) -> None:
    sweep = small(tmp_path, "followed-1")
    (point,) = sweep.train_points()
    outbox = Outbox(sweep.paths, uri)
    with sweep.open() as writer:
        sweep.start(writer)
        training = sweep.begin(writer, point)
        outbox.step()
        live = runs_of(client, "followed-1")[training]
        curve = sweep.paths.store / "trainings" / training / "metrics.jsonl"
        with curve.open("a") as file:
            file.writelines(curve_lines(1_790_001_000.0, range(7100, 7201, 100)))
        outbox.step()
        grown = client.get_metric_history(live.info.run_id, "train/loss")
        sweep.end(writer, point)
        sweep.finish(writer, "cancelled")
    outbox.step()

    ended = runs_of(client, "followed-1")
    assert live.info.status == "RUNNING"
    assert [p.step for p in grown][-1] == 7_200
    assert {run.info.status for run in ended.values()} == {"FINISHED", "KILLED"}
    assert outbox.health().lag_events == {}


def test_a_sweep_that_nobody_writes_is_closed_and_goes_on_in_the_same_runs(
    tmp_path: Path, uri: str, client: Any
) -> None:
    sweep = small(tmp_path, "orphan-1")
    (point,) = sweep.train_points()
    outbox = Outbox(sweep.paths, uri)
    with sweep.open() as writer:
        sweep.start(writer)
        sweep.begin(writer, point)
        outbox.step()
        running = runs_of(client, "orphan-1")
    outbox.step()
    orphaned = runs_of(client, "orphan-1")
    with sweep.open() as writer:
        sweep.start(writer)
        outbox.step()
        again = runs_of(client, "orphan-1")["orphan-1"]
        sweep.train(writer, point)
        sweep.finish(writer)
    outbox.step()

    ended = runs_of(client, "orphan-1")
    assert {run.info.status for run in running.values()} == {"RUNNING"}
    assert {run.info.status for run in orphaned.values()} == {"KILLED"}
    assert again.info.status == "RUNNING"
    assert {run.info.status for run in ended.values()} == {"FINISHED"}
    assert {key: run.info.run_id for key, run in ended.items()} == {
        key: run.info.run_id for key, run in running.items()
    }


def test_a_damaged_ledger_and_a_refusal_hold_up_no_other_sweep(
    tmp_path: Path, uri: str, client: Any
) -> None:
    damaged, trap = small(tmp_path, "damaged-1"), small(tmp_path, "atrap-1")
    good = small(tmp_path, "good-1")
    for sweep in (damaged, trap, good):
        sweep.write()
    path = damaged.paths.sweep("damaged-1").ledger
    path.write_bytes(path.read_bytes().replace(b'"cached":false', b'"cached":0', 1))
    client.create_experiment("atrap", "file:///etc/elsewhere")
    outbox = Outbox(good.paths, uri)

    outbox.step()
    outbox.step()  # nothing has changed: not tried again
    first = {s.sweep_id: refusals(s) for s in (damaged, trap, good)}
    with trap.open() as writer:
        trap.finish(writer)
    outbox.step()

    assert_equals_the_ledger(contents(client, "good-1"), good)
    assert "line 3 is damaged" in first["damaged-1"][0]["reason"]
    assert "outside of this home" in first["atrap-1"][0]["reason"]
    assert [len(each) for each in first.values()] == [1, 1, 0]
    assert len(refusals(trap)) == 2
    health = outbox.health()
    assert health.refused.keys() == {"damaged-1", "atrap-1"}
    assert health.trouble is None


def refusals(sweep: Sweep) -> list[dict[str, Any]]:
    path = sweep.paths.sweep(sweep.sweep_id).refused
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_a_sweep_that_another_process_writes_is_left_to_it(
    tmp_path: Path, uri: str, client: Any
) -> None:
    sweep = small(tmp_path, "shared-1")
    (point,) = sweep.train_points()
    outbox = Outbox(sweep.paths, uri)
    with sweep.open() as writer:
        sweep.start(writer)
        with only_projector(sweep.paths.sweep("shared-1"), patience_s=0.0):
            outbox.step()
            left = runs_of(client, "shared-1")
        outbox.step()
        sweep.train(writer, point)
        tracking.sync(sweep.paths, "shared-1", uri)  # creates a run that the outbox has not seen
        sweep.finish(writer)
    outbox.step()

    assert left == {}
    assert {run.info.status for run in runs_of(client, "shared-1").values()} == {"FINISHED"}


def test_what_another_process_writes_lags_only_as_far_as_it_has_not_come(tmp_path: Path) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    sweep = small(tmp_path, "theirs-1")
    folder, outbox = sweep.paths.sweep("theirs-1"), Outbox(sweep.paths, nowhere)
    with sweep.open() as writer, only_projector(folder, patience_s=0.0):
        sweep.start(writer)
        is_all_there = outbox.step()
        lag = outbox.health().lag_events
        folder.tracking.write_text(json.dumps({"uri": nowhere, "num_events": 1}))
        is_all_there_then = outbox.step()

    assert (is_all_there, lag) == (False, {"theirs-1": 1})
    assert (is_all_there_then, outbox.health().lag_events) == (True, {})


def test_a_ledger_that_was_begun_anew_is_written_from_its_start(
    tmp_path: Path, uri: str, client: Any
) -> None:
    sweep = small(tmp_path, "anew-1")
    sweep.write()
    outbox = Outbox(sweep.paths, uri)
    outbox.step()
    sweep.paths.sweep("anew-1").ledger.unlink()
    with sweep.open() as writer:
        sweep.start(writer)
        sweep.finish(writer, "cancelled")
    outbox.step()

    assert runs_of(client, "anew-1")["anew-1"].data.tags["fairway.state"] == "cancelled"


def test_a_thousand_finished_sweeps_cost_no_more_than_a_look(tmp_path: Path) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    sweep = small(tmp_path, "old-0000")
    sweep.write()
    text, num = sweep.paths.sweep("old-0000").ledger.read_bytes(), num_events(sweep)
    for number in range(1_000):
        folder = sweep.paths.sweep(f"old-{number:04}")
        folder.root.mkdir(exist_ok=True)
        folder.ledger.write_bytes(text)
        folder.tracking.write_text(json.dumps({"uri": nowhere, "num_events": num}))
    outbox = Outbox(sweep.paths, nowhere)

    is_all_there = outbox.step()
    started = time.thread_time()
    outbox.step()
    took_s = time.thread_time() - started
    with sweep.open() as writer:
        sweep.start(writer)
    was_reached = outbox.step()

    assert is_all_there
    assert took_s < 1.0
    assert not was_reached
    assert outbox.health().lag_events == {"old-0000": 1}
    told = read_health(sweep.paths)
    assert told is not None
    assert told.trouble is not None
    assert nowhere in told.trouble


def test_nothing_is_asked_of_a_server_out_of_reach_before_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("POLL_S", "MAX_BACKOFF_S"):
        monkeypatch.setattr(f"service.outbox.{name}", 3_600.0)  # its time does not come here
    for number in range(5):
        small(tmp_path, f"waits-{number}").write()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        outbox = Outbox(Paths(tmp_path), f"http://127.0.0.1:{listener.getsockname()[1]}")
        num_asked = 0

        def hang_up() -> None:
            nonlocal num_asked
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                num_asked += 1
                connection.close()

        with in_thread(hang_up):
            outbox.step()
            after_one = num_asked
            for _ in range(20):
                outbox.step()
            listener.shutdown(socket.SHUT_RDWR)

    assert 0 < after_one <= 2 * 2  # two sweeps of five, then it waits; urllib3 may ask twice
    assert num_asked <= 5 * 2  # each of the others once, none a second time
    assert sorted(outbox.health().lag_events) == [f"waits-{number}" for number in range(5)]


def test_told_to_end_the_outbox_ends_while_the_server_hangs(tmp_path: Path) -> None:
    small(tmp_path, "hangs-1").write()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        uri = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with OutboxProcess(tmp_path, uri) as outbox:
            listener.settimeout(PATIENCE_S)
            connection, _ = listener.accept()
            started = time.monotonic()
            outbox.process.terminate()
            outbox.process.join(PATIENCE_S)
            took_s = time.monotonic() - started
            connection.close()

    assert outbox.process.exitcode == 0
    assert took_s < 60  # a request is given up after twice as long


def test_the_outbox_ends_with_the_service_that_it_serves(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "service.outbox", "--home", str(tmp_path)]
    command += ["--uri", "http://127.0.0.1:9", "--parent-pid", str(NOT_A_PROCESS)]

    done = subprocess.run(command, timeout=PATIENCE_S, capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")


def test_once_says_by_its_exit_code_that_something_is_left(tmp_path: Path) -> None:
    sweep = small(tmp_path, "left-1")
    sweep.write()
    sweep.paths.sweep("left-1").ledger.write_text("{}\n")
    command = [sys.executable, "-m", "service.outbox", "--home", str(tmp_path), "--once"]

    done = subprocess.run(command, timeout=PATIENCE_S, capture_output=True, text=True)

    assert done.returncode == 5
    assert "line 1 is damaged" in done.stderr
    told = read_health(sweep.paths)
    assert told is not None
    assert "line 1 is damaged" in told.refused["left-1"]
