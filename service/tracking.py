"""The projection of a sweep's ledger into MLflow, by one process that may die at any time.

    python -m service.tracking --home HOME --sweep SWEEP_ID --uri URI

follows the ledger and the curves of running trainings, writes what is new, and ends after it has
written `sweep_finished`. The ledger is the truth: deleting MLflow's store or tracking.json and
projecting again gives the same runs.

It is on no training's way: the sweep goes on when the tracking server does not. Owns when to
write, waiting for the server and ending; `projector` owns what is written.
"""

import argparse
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import NamedTuple

from service import mlflow_store
from service.ledger import is_held
from service.paths import Paths, SweepPaths
from service.projector import DEFAULT_PORT, Projection, Projector
from trainer.errors import FairwayError, UsageError
from trainer.runtime.environment import MLFLOW_SERVER, quiet_mlflow
from trainer.runtime.files import locked

logger = logging.getLogger(__name__)

POLL_S = 1.0
LOCK_S = 30.0
SYNC_S = 5.0  # the outbox may just have this sweep in hand
MAX_BACKOFF_S = 60.0


def default_uri(paths: Paths) -> str:
    """The embedded store: a SQLite file in the home."""
    return f"sqlite:///{paths.mlflow_db.resolve()}"


def ui_command(paths: Paths, *, port: int = DEFAULT_PORT) -> str:
    """The shell command that serves MLflow's page on the embedded store, on loopback only."""
    executable = Path(sys.executable).with_name("mlflow")
    settings = [f"{name}={value}" for name, value in MLFLOW_SERVER.items()]
    words = [str(executable), "server", "--backend-store-uri", default_uri(paths)]
    words += ["--default-artifact-root", paths.mlflow_artifacts.resolve().as_uri()]
    words += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return " ".join([*settings, *map(shlex.quote, words)])


def sync(paths: Paths, sweep_id: str, uri: str) -> Projection:
    """Write what the ledger holds now and return. Runs that a sweep left open when its process
    died become KILLED."""
    return project(paths, sweep_id, uri, follow=False)


def project(
    paths: Paths,
    sweep_id: str,
    uri: str,
    *,
    follow: bool,
    parent_pid: int | None = None,
    after: int = 0,
    stop: Event | None = None,
) -> Projection:
    """Write a sweep to MLflow, once or until its `sweep_finished` is written.

    A `sweep_finished` up to event number `after` is an older run's and ends nothing. Following
    ends too, once there is no news, when `parent_pid` is gone or `stop` is set; open runs then
    become KILLED until the sweep goes on. Raises BackendError where the server refuses or was
    never reached, UsageError where another process projects the same sweep.
    """
    quiet_mlflow()
    sweep = paths.sweep(sweep_id)
    if not follow and not sweep.ledger.is_file():
        raise UsageError(f"{sweep.ledger}: no such sweep; see `fairway status`")
    parent = Parent(parent_pid, stop)
    with only_projector(sweep, patience_s=LOCK_S if follow else SYNC_S):
        if follow:
            return _follow(Projector(paths, sweep_id, uri), parent, after)
        is_left = not is_held(sweep.ledger)
        projector = Projector(paths, sweep_id, uri)
        projector.step()
        if is_left:
            projector.abandon()
        return projector.projection()


def _follow(projector: Projector, parent: "Parent", after: int) -> Projection:
    failures, was_connected = 0, False
    while True:
        is_orphan = parent.is_gone()
        try:
            has_news = projector.step()
            failures, was_connected = 0, was_connected or projector.is_connected
        except mlflow_store.Unreachable as error:
            if is_orphan or not was_connected:
                raise
            pause_s = min(MAX_BACKOFF_S, POLL_S * 2**failures)
            logger.warning("%s; next try in %.0f s", error, pause_s)
            failures += 1
            projector = projector.again()
            time.sleep(pause_s)
            continue
        if projector.is_finished(after):
            return projector.projection()
        if is_orphan and not has_news:
            projector.abandon()
            return projector.projection()
        if not has_news:
            time.sleep(POLL_S)


class Parent:
    """The process that this one serves: gone when it is, or when it said so."""

    def __init__(self, pid: int | None, stop: Event | None) -> None:
        self._pid, self._stop = pid, stop
        # A direct parent shows by who adopts us: its pid may linger or be given away.
        self._is_direct = pid is not None and os.getppid() == pid

    def is_gone(self) -> bool:
        """Whether there is nobody left to serve."""
        if self._stop is not None and self._stop.is_set():
            return True
        if self._pid is None:
            return False
        if self._is_direct:
            return os.getppid() != self._pid
        return not Path(f"/proc/{self._pid}").exists()


class Turn(NamedTuple):
    """One holding of a sweep's lock, named by a mark that no other has, and the one before it."""

    mark: str
    before: str


@contextmanager
def only_projector(sweep: SweepPaths, *, patience_s: float) -> Iterator[Turn]:
    """Hold a sweep's lock; UsageError while another process does. A projector that is kept from
    one turn to the next knows every run there is only if nobody had a turn in between.

    A killed run's projector needs a moment to notice and let go.
    """
    lock = sweep.tracking.with_suffix(".lock")
    deadline = time.monotonic() + patience_s
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(lock, wait=False))
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise UsageError(
                        f"{lock}: another process writes this sweep to MLflow; wait for it or "
                        "stop it first"
                    ) from error
                time.sleep(POLL_S / 2)
        turn = Turn(f"{os.getpid()} {time.time_ns()}\n", lock.read_text(encoding="utf-8"))
        lock.write_text(turn.mark, encoding="utf-8")
        yield turn


def main(arguments: Sequence[str] | None = None) -> int:
    """Project one sweep as a process of its own; the exit code is the error's."""
    parser = argparse.ArgumentParser(prog="python -m service.tracking", description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--sweep", required=True)
    parser.add_argument("--uri", help="the embedded store when left out")
    parser.add_argument("--once", action="store_true", help="write what is there and end")
    parser.add_argument("--parent-pid", type=int, help="end when this process is gone")
    parser.add_argument("--after", type=int, default=0, help="number of the last old event")
    given = parser.parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(message)s")
    # Ctrl-C reaches the whole group: the sweep drains, and its last events are still written.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop = Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    paths = Paths(given.home)
    try:
        project(
            paths,
            given.sweep,
            given.uri or default_uri(paths),
            follow=not given.once,
            parent_pid=given.parent_pid,
            after=given.after,
            stop=stop,
        )
    except FairwayError as error:
        logger.error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
