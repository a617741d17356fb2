"""The files by which a job is known on every machine that shares the home.

    HOME/sweeps/ID/jobs/N.lock    held (flock) by attempt N's processes as long as they run
    HOME/sweeps/ID/jobs/N.json    {"job", "attempt", "pid", "host", "started_at", "num_events"},
                                  and at its end "ended_at", "exit_code", "message"

N.json is written once under the lock: who finds it does not begin, so an attempt that is started
twice runs once. A lock that nobody holds beside an N.json without an end is a job that was killed.
"""

import fcntl
import os
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from service.jobs.runner import Job, JobState
from service.paths import SweepPaths
from trainer.runtime.files import read_json, write_json

PATIENCE_S = 5.0
"""A reader's glance at the lock, which takes no time, must not turn a job away."""
_TAIL_BYTES = 4096
_KILLED = "it was killed, or its node is gone"


class Taken(Exception):
    """Another process holds the lock, or the attempt has been run or called off."""


@dataclass(frozen=True, slots=True)
class Begun:
    """Who runs an attempt, or ran it. `num_events`: what the ledger held when it began."""

    pid: int
    host: str
    num_events: int


class JobFiles:
    """The files of one attempt."""

    def __init__(self, sweep: SweepPaths, attempt: int) -> None:
        self._sweep = sweep
        self._attempt = attempt
        self._lock = sweep.jobs / f"{attempt}.lock"
        self._record = sweep.jobs / f"{attempt}.json"

    @classmethod
    def of(cls, job: Job) -> "JobFiles":
        return cls(job.sweep, job.attempt)

    def state(self) -> JobState:
        """Where the job stands, as far as its files tell."""
        record = self._read_free()
        if record is None:
            return JobState("running")
        if not record:
            return JobState("absent")
        code: int | None = record.get("exit_code")
        if code is not None and code < 0:  # by that signal
            code = None
        return JobState("ended", code, record.get("message", _KILLED))

    def begun(self) -> Begun | None:
        """Who runs the attempt, or ran it; None before it began, and if it was called off."""
        if not self._record.is_file():
            return None
        found: dict[str, Any] = read_json(self._record)
        if found["pid"] is None:
            return None
        return Begun(found["pid"], found["host"], found["num_events"])

    def is_settled(self) -> bool:
        """Whether its end is written down, rather than inferred from a lock that nobody holds."""
        return self._record.is_file() and "ended_at" in read_json(self._record)

    @contextmanager
    def begin(self) -> Generator[int]:
        """Take the attempt for this process; the descriptor holds the lock, so a child that
        inherits it keeps the job running. Taken if it is not to be had."""
        with self._open() as file:
            if not _lock(file, fcntl.LOCK_EX, PATIENCE_S):
                raise Taken(f"{self._lock}: held by another process")
            if self._record.is_file():
                raise Taken(f"{self._record}: this attempt has been run, or was called off")
            newer = max(attempts(self._sweep), default=0)
            if newer > self._attempt:
                raise Taken(f"{self._record}: attempt {newer} is the sweep's newest")
            num_events = _count_lines(self._sweep)
            write_json(self._record, self._facts(os.getpid()) | {"num_events": num_events})
            yield file.fileno()

    def end(self, exit_code: int, message: str) -> None:
        """Write down how it ended; by the process that began it. Negative: by that signal."""
        ended = {"ended_at": time.time(), "exit_code": exit_code, "message": message}
        write_json(self._record, read_json(self._record) | ended)

    def call_off(self) -> bool:
        """See to it that an attempt that has not begun never does. False if it runs."""
        with self._open() as file:
            if not _lock(file, fcntl.LOCK_EX, 0.2):
                return False
            if not self._record.is_file():
                ended = {"ended_at": time.time(), "message": "stopped before it began"}
                write_json(self._record, self._facts(None) | ended)
            return True

    def _facts(self, pid: int | None) -> dict[str, Any]:
        return {
            "job": f"{self._sweep.root.name}.{self._attempt}",
            "attempt": self._attempt,
            "pid": pid,
            "host": socket.gethostname(),
            "started_at": time.time(),
        }

    def _read_free(self) -> dict[str, Any] | None:
        """The record, {} where there is none; None as long as the lock is held."""
        try:
            file = self._lock.open("rb")
        except FileNotFoundError:
            return {}
        with file:  # under the lock, or an end could be written between the two looks
            if not _lock(file, fcntl.LOCK_SH, 0.0):
                return None
            return read_json(self._record) if self._record.is_file() else {}

    def _open(self) -> IO[bytes]:
        self._sweep.jobs.mkdir(parents=True, exist_ok=True)
        return self._lock.open("a+b")


def attempts(sweep: SweepPaths) -> list[int]:
    """The attempts at a sweep that have been begun or called off."""
    return sorted(int(path.stem) for path in sweep.jobs.glob("*.json") if path.stem.isdigit())


def running_attempts(sweep: SweepPaths) -> list[int]:
    """The attempts at a sweep that run now."""
    known = (int(path.stem) for path in sweep.jobs.glob("*.lock") if path.stem.isdigit())
    return [n for n in sorted(known) if JobFiles(sweep, n).state().phase == "running"]


def last_line(path: Path) -> str:
    """The last line of a log that says something; empty without one."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _lock(file: IO[bytes], kind: int, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        else:
            return True


def _count_lines(sweep: SweepPaths) -> int:
    """How many events the ledger has: complete lines, as its writer counts them."""
    if not sweep.ledger.is_file():
        return 0
    with sweep.ledger.open("rb") as file:
        return sum(line.endswith(b"\n") for line in file)
