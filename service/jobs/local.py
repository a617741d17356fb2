"""Jobs as processes of this machine, each in a session of its own, so that they outlive us."""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence

from service.jobs.entry import command
from service.jobs.files import JobFiles
from service.jobs.runner import STOP_S, Job, JobState
from trainer.errors import BackendError
from trainer.runtime.environment import without_secrets

_LOOK_S = 0.1


class LocalRunner:
    """Runs jobs on this machine, `num_cpus` for the Ray of each; thread-safe."""

    name = "local"

    def __init__(
        self,
        num_cpus: int | None = None,
        program: Sequence[str] = (),
        stop_s: float = STOP_S,
    ) -> None:
        """`program` replaces `fairway run`; `stop_s` lies between asking to end and killing."""
        self._stop_s = stop_s
        self._num_cpus = num_cpus
        self._program = tuple(program)
        self._turn = threading.Lock()
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._ending: set[str] = set()

    def check(self) -> None:
        """This machine is always within reach."""

    def start(self, job: Job) -> None:
        """Start its process in a session of its own, unless it has one or had one."""
        with self._turn:
            if self.state(job).phase != "absent":
                return
            environment = without_secrets()
            environment.pop("RAY_ADDRESS", None)  # a job of this machine has a Ray of its own
            job.log.parent.mkdir(parents=True, exist_ok=True)
            with job.log.open("ab") as log:  # for a Python that does not start
                process = subprocess.Popen(
                    command(job, num_cpus=self._num_cpus, program=self._program),
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self._started[job.id] = process
        # Or it would stay as a zombie for as long as we live.
        threading.Thread(target=process.wait, name=f"job {job.id}", daemon=True).start()

    def state(self, job: Job) -> JobState:
        """Tell where a job stands by its files, or by its process until it has written them."""
        process = self._started.get(job.id)
        code = None if process is None else process.poll()  # first: its files are written by then
        state = JobFiles.of(job).state()
        if state.phase != "absent" or process is None:
            if state.phase == "ended":  # its files tell all that there is to know
                self._started.pop(job.id, None)
            return state
        if code is None:
            return JobState("running", message="its process is starting")
        return JobState("ended", message=f"it ended with {code} before it began; see {job.log}")

    def stop(self, job: Job) -> None:
        """Call a job off, or end its processes; BackendError where they are another machine's."""
        files = JobFiles.of(job)
        if files.call_off():
            return
        with self._turn:
            if job.id in self._ending:
                return
            self._ending.add(job.id)
        begun = files.begun()
        if begun is not None and begun.host != socket.gethostname():
            self._ending.discard(job.id)
            raise BackendError(
                f"job {job.id} runs on {begun.host}, which this service cannot stop; run the "
                "service there"
            )
        threading.Thread(target=self._end, args=(job,), name=f"end {job.id}", daemon=True).start()

    def _end(self, job: Job) -> None:
        """Ask, wait, kill. The lock says that process or child live, so the number is theirs."""
        files = JobFiles.of(job)
        deadline = time.monotonic() + self._stop_s
        asked = False
        try:
            while files.state().phase == "running":
                begun = files.begun()  # None for the moment between the lock and the record
                if begun is not None and time.monotonic() >= deadline:
                    _signal_group(begun.pid, signal.SIGKILL)
                elif begun is not None and not asked:
                    _ask(begun.pid)
                    asked = True
                time.sleep(_LOOK_S)
        finally:
            with self._turn:
                self._ending.discard(job.id)


def _ask(pid: int) -> None:
    """The entry passes it on; where that was killed alone, its child is left in its group."""
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        _signal_group(pid, signal.SIGTERM)


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return  # ended just now
