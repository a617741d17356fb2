"""A home with a queue, a dispatcher and jobs that stand in for sweeps, for tests of the service.

`python -m tests.dispatching HOME SLOTS` reads lines from stdin: for each it forks a process that
dispatches until it is killed, and writes its pid, and "ticked" after its first tick.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from service.jobs.dispatcher import Dispatcher, Patience
from service.jobs.files import JobFiles
from service.jobs.local import LocalRunner
from service.jobs.ray_jobs import RayJobRunner
from service.jobs.runner import Job, Runner
from service.ledger import replay
from service.paths import Paths
from service.queue.database import default_url, open_database
from service.queue.queue import Queue
from service.queue.quotas import Quotas
from service.queue.records import NewSweep, Role, SweepRecord, User
from service.states import State
from service.tails import Tails

ROOT = Path(__file__).parents[1]
PROGRAM = (sys.executable, "-m", "tests.stand_in_job")
ALICE = User("alice", Role.SUBMITTER)
PATIENCE_S = 120.0


class Home:
    """A Fairway home whose sweeps are stand-ins."""

    def __init__(self, home: Path, slots: int = 2, runner: Runner | None = None) -> None:
        self.paths = Paths(home.resolve())
        self.slots = slots
        self.runner = runner or local_runner()
        self.engine = open_database(default_url(self.paths))
        self.queue, self.quotas = Queue(self.engine), Quotas(self.engine)
        self.dispatcher = self.restarted()

    def restarted(self, runner: Runner | None = None) -> Dispatcher:
        """A dispatcher as a new process of the service would make it."""
        self.runner = runner or self.runner
        self.dispatcher = Dispatcher(
            self.queue, self.quotas, self.runner, self.paths, Tails(self.paths), self.slots
        )
        self.dispatcher.patience = Patience(restarts_s=(0.0,))
        return self.dispatcher

    def submit(self, name: str, *, user: User = ALICE, gangs: int = 1, **told: Any) -> SweepRecord:
        """Submit a stand-in that does what `told` says; see tests/stand_in_job.py."""
        sweep_id = f"{name}-0123456789ab"
        bundle = self.paths.submissions / name
        bundle.mkdir(parents=True)
        (bundle / "sweep.yaml").write_text(json.dumps({"sweep_id": sweep_id, **told}))
        new = NewSweep(sweep_id, name, "pr414", name, ("budget.gpu_hours=1",), name, {}, gangs)
        return self.queue.submit(new, user)[0]

    def state(self, name: str) -> State:
        return self.record(name).state

    def record(self, name: str) -> SweepRecord:
        return self.queue.find(name)

    def files(self, name: str, attempt: int = 1) -> JobFiles:
        return JobFiles(self.paths.sweep(self.record(name).sweep_id), attempt)

    def job(self, name: str, attempt: int = 1) -> Job:
        home = self.paths.home
        return Job(self.record(name).sweep_id, attempt, home, self.paths.submissions / name)

    def tick_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, self.queue.page().items
            self.dispatcher.tick()
            time.sleep(0.02)

    def tick_until_state(self, name: str, *states: State) -> SweepRecord:
        self.tick_until(lambda: self.state(name) in states)
        return self.record(name)

    def let_go(self, place: str) -> None:
        """Let every stand-in that holds at this place go on."""
        (self.paths.home / f"go-{place}").touch()

    def starts(self) -> Counter[tuple[str, int]]:
        """How often each attempt at each sweep was started, by its name and number."""
        path = self.paths.home / "starts.txt"
        lines = path.read_text().splitlines() if path.is_file() else []
        words = (line.split() for line in lines)
        return Counter((sweep_id.rpartition("-")[0], int(number)) for sweep_id, number in words)

    def ledger_state(self, name: str) -> State:
        ledger = self.paths.sweep(self.record(name).sweep_id).ledger
        return replay(ledger).state if ledger.is_file() else State.QUEUED

    def log(self, name: str) -> str:
        return self.job(name).log.read_text()

    def close(self) -> None:
        """End every job that is left."""
        for record in self.queue.page(limit=200).items:
            for attempt in range(1, record.attempt + 1):
                job = Job(record.sweep_id, attempt, self.paths.home, self.paths.home)
                files = JobFiles.of(job)
                while files.state().phase == "running":
                    if (begun := files.begun()) is not None:
                        kill_group(begun.pid)
                    time.sleep(0.02)
        self.engine.dispose()


class Killable:
    """Dispatchers in processes of their own, forked from one that has imported all they need."""

    def __init__(self, home: Home) -> None:
        words = [sys.executable, "-m", "tests.dispatching", str(home.paths.home), str(home.slots)]
        self._parent = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def start(self) -> int:
        assert self._parent.stdin is not None
        self._parent.stdin.write(b"\n")
        self._parent.stdin.flush()
        return int(self._line())

    def wait_until_ticked(self) -> None:
        assert self._line() == "ticked"

    def _line(self) -> str:
        assert self._parent.stdout is not None
        return self._parent.stdout.readline().decode().strip()

    def end(self) -> None:
        self._parent.communicate()


def local_runner(stop_s: float = 60.0, program: Sequence[str] = PROGRAM) -> LocalRunner:
    return LocalRunner(None, program, stop_s)


def kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def wait_until(condition: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


_RAY_RUNNERS: dict[str, RayJobRunner] = {}


def set_environment(variables: dict[str, str]) -> None:
    """Ray reads those of its token once, when it is imported; so, in a process without it."""
    os.environ.update(variables)


def ask_ray(address: str, method: str, *words: Job) -> Any:
    """Call this process's runner of a cluster, made when it is first asked for."""
    if address not in _RAY_RUNNERS:
        _RAY_RUNNERS[address] = RayJobRunner(address, PROGRAM)
    return getattr(_RAY_RUNNERS[address], method)(*words)


def _dispatch(home: Path, slots: int, say: Callable[[str], object]) -> None:
    dispatcher = Home(home, slots).dispatcher
    dispatcher.tick()
    say("ticked")
    while True:
        dispatcher.tick()
        time.sleep(0.02)


def main() -> None:
    home, slots = Path(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # none shall stay as a zombie

    def say(word: str) -> None:
        os.write(1, f"{word}\n".encode())

    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                _dispatch(home, slots, say)
            finally:
                os._exit(1)
        say(str(pid))


if __name__ == "__main__":
    main()
