"""Plans submissions in child processes, so that none can hurt the service.

A child is started once and waits: what takes long is its imports. It gets one request at a time,
a line of JSON, and answers with another. It may take so many seconds and so much memory; one that
needs more is ended, and the submission refused. The environment it sees holds none of our secrets.
"""

import json
import logging
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import service
from service.paths import Paths
from service.planning import Bundles, Planned, Submission, check_submission, plan_bundle
from service.queue.records import NewSweep
from trainer.errors import BackendError, FairwayError, UsageError
from trainer.runtime.environment import without_secrets

logger = logging.getLogger(__name__)

NUM_CHILDREN = 2
PLAN_TIMEOUT_S = 30.0
WAIT_S = 30.0  # for a child that is free
MAX_WAITING = 16  # beyond, threads that answer reads would run out
MEMORY_BYTES = 2 * 1024**3
_PACKAGES = Path(str(service.__file__)).parent.parent
_TOO_LARGE = "sweep.yaml: too large to plan"


class PlannerTrouble(BackendError):
    """Nothing can be planned now; the text is fit for callers, as other BackendErrors' is not."""


class Planner:
    """Checks, plans and keeps submissions for one home; thread-safe.

    Raises UsageError for what is wrong with a submission, PlannerTrouble where too many come at
    once.
    """

    def __init__(
        self,
        paths: Paths,
        roots: Sequence[Path] = (),
        *,
        timeout_s: float = PLAN_TIMEOUT_S,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self._home = paths.home.resolve()
        self._roots = [str(root.absolute()) for root in roots]
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._bundles = Bundles(paths)
        self._bundles.clear()
        self._seats = threading.BoundedSemaphore(NUM_CHILDREN + MAX_WAITING)
        self._children: queue.LifoQueue[_Child | None] = queue.LifoQueue()
        for _ in range(NUM_CHILDREN):
            self._children.put(None)  # one that is started when it is needed

    def warm_up(self) -> None:
        """Start the children, so that the first submission does not wait for them."""
        idle = [self._children.get() for _ in range(NUM_CHILDREN)]
        for child in idle:
            self._children.put(child or _Child(self._memory_bytes))

    def plan(self, submission: Submission) -> Planned:
        """What a submission would run; nothing is kept."""
        check_submission(submission)
        with self._seat():
            folder = self._bundles.lay_out(submission)
            try:
                return self._ask(folder, submission)
            finally:
                self._bundles.discard(folder)

    def accept(self, submission: Submission, priority: int = 0) -> NewSweep:
        """Plan a submission and keep its bundle, for the queue."""
        check_submission(submission)
        with self._seat():
            folder = self._bundles.lay_out(submission)
            try:
                planned = self._ask(folder, submission)
                kept = self._bundles.keep(folder, submission.digest)
            except BaseException:
                self._bundles.discard(folder)
                raise
        return NewSweep(
            sweep_id=planned.sweep_id,
            name=planned.name,
            recipe=planned.recipe,
            bundle=kept.name,
            assignments=submission.assignments,
            digest=submission.digest,
            plan=planned.plan,
            gangs=planned.gangs,
            priority=priority,
        )

    def close(self) -> None:
        """End the children."""
        with suppress(queue.Empty):
            while True:
                if child := self._children.get_nowait():
                    child.end()

    @contextmanager
    def _seat(self) -> Iterator[None]:
        if not self._seats.acquire(blocking=False):
            raise PlannerTrouble("too many submissions are being planned; try again in a moment")
        try:
            yield
        finally:
            self._seats.release()

    def _ask(self, folder: Path, submission: Submission) -> Planned:
        try:
            child = self._children.get(timeout=WAIT_S)
        except queue.Empty as error:
            raise PlannerTrouble("the planner is busy; try again in a moment") from error
        request = {
            "bundle": str(folder),
            "assignments": list(submission.assignments),
            "home": str(self._home),
            "roots": self._roots,
            "timeout_s": self._timeout_s,
        }
        try:
            child = self._ready(child)
            answer = child.ask(request, self._timeout_s)
            if answer.get("is_last"):
                child.end()
                child = None
        except _Ended as error:
            child = None
            limits = f"{self._timeout_s:g} s or {self._memory_bytes >> 20:,} MiB"
            raise UsageError(f"{_TOO_LARGE}: it takes more than {limits}") from error
        finally:
            self._children.put(child)
        return _read(answer)

    def _ready(self, child: "_Child | None") -> "_Child":
        """A child that lives: this one, or another."""
        if child is not None:
            if not child.is_gone():
                return child
            child.end()
        try:
            return _Child(self._memory_bytes)
        except OSError as error:
            why = error.strerror
            raise PlannerTrouble(f"no process can be started to plan in: {why}") from error


def _read(answer: dict[str, Any]) -> Planned:
    """The plan of an answer, or the error that it tells."""
    if answer.get("fault"):
        logger.error("a submission could not be planned", extra={"facts": answer})
    match answer["kind"]:
        case "planned":
            return Planned(**answer["planned"])
        case "refused":
            raise UsageError(answer["text"])
        case _:
            raise PlannerTrouble(answer["text"])


class _Ended(Exception):
    """A child was ended over its request: by us, by the kernel or by a limit."""


class _Child:
    """One child process and the socket to it."""

    def __init__(self, memory_bytes: int) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __spec__.name, str(theirs.fileno()), str(memory_bytes)],
                cwd=_PACKAGES,
                env=_environment(),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the service
            )

    def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Its answer; _Ended where there is none in time."""
        try:
            return self._ask(json.dumps(request).encode(), time.monotonic() + timeout_s)
        except (OSError, ValueError) as error:
            self.end()
            raise _Ended from error

    def _ask(self, request: bytes, deadline: float) -> dict[str, Any]:
        received = bytearray()
        self._socket.settimeout(deadline - time.monotonic())
        self._socket.sendall(request + b"\n")
        while not received.endswith(b"\n"):
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            part = self._socket.recv(1 << 16)
            if not part:
                raise ConnectionError("the child is gone")
            received += part
        return json.loads(received)

    def is_gone(self) -> bool:
        """Whether it died while it waited, by no fault of a submission."""
        return self._process.poll() is not None

    def end(self) -> None:
        """End it, whatever it does."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


def _environment() -> dict[str, str]:
    """What a child may see of ours, and one thread for its sums."""
    ours = without_secrets().items()
    plain = {name: value for name, value in ours if not name.startswith("RAY_")}
    return {**plain, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _serve(handle: int, memory_bytes: int) -> None:
    """In the child: answer requests until the service is gone."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with (
        suppress(ConnectionError),  # the service is gone: nobody waits for the answer
        socket.socket(fileno=handle) as connection,
        connection.makefile("rwb") as stream,
    ):
        for line in stream:
            request = json.loads(line)
            # Should the service die meanwhile, nobody else would end a plan without end.
            signal.setitimer(signal.ITIMER_REAL, request["timeout_s"] + 5.0)
            answer = _answer(request)
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            stream.write(json.dumps(answer).encode() + b"\n")
            stream.flush()
            if answer.get("is_last"):
                return


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    bundle, home = Path(request["bundle"]), Path(request["home"])
    roots = [Path(root) for root in request["roots"]]
    os.chdir(bundle)
    try:
        planned = plan_bundle(bundle, request["assignments"], Paths(home), roots)
        return {"kind": "planned", "planned": asdict(planned)}
    except FairwayError as error:
        kind = "refused" if isinstance(error, UsageError) else "failed"
        return {"kind": kind, "text": _as_known(str(error), bundle, home)}
    except MemoryError:
        return {"kind": "refused", "text": f"{_TOO_LARGE} in memory", "is_last": True}
    except OSError as error:
        text = f"the service's home cannot be used: {error.strerror}"
        return {"kind": "failed", "text": text, "fault": traceback.format_exc()}
    except Exception as error:  # the spec brought it about: the log tells the rest
        text = f"sweep.yaml: cannot be planned ({type(error).__name__})"
        return {"kind": "refused", "text": text, "fault": traceback.format_exc()}
    finally:
        os.chdir(_PACKAGES)


def _as_known(text: str, bundle: Path, home: Path) -> str:
    """An error's text with the files as the user knows them."""
    for ours, theirs in ((f"{bundle}/", ""), (str(home), "HOME"), (f"{_PACKAGES}/", "")):
        text = text.replace(ours, theirs)
    return text


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
