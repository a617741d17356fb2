"""A gang of this machine's own processes, without Ray: one rank each, and all end together.

The caller hears how far the ranks are and gets what the first of them returns. When one dies the
others are ended too, and a rank whose caller is gone ends itself.
"""

import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from trainer.errors import FairwayError, UsageError
from trainer.evaluate.progress import Progress
from trainer.runtime.distributed import Ranks

Work = Callable[[Any, Ranks, Progress], Any]
"""A module's function: the request, this process's place in the gang, and whom to tell."""

_LAST_WORDS_S = 0.5  # for ranks that fail because another did
_END_S = 5.0


class WorkerLost(FairwayError):
    """A worker died without a word: killed, or out of memory."""


class _Reporter:
    """A rank's progress, sent to the caller."""

    def __init__(self, caller: Connection) -> None:
        self.caller = caller

    def resumed(self, predictions: int) -> None:
        self.caller.send(("resumed", predictions))

    def advance(self, predictions: int) -> None:
        self.caller.send(("advance", predictions))


class _Member:
    """A rank's process, as its caller sees it, and how it ended."""

    def __init__(self, process: SpawnProcess, pipe: Connection) -> None:
        self.process = process
        self.pipe = pipe
        self.result: Any = None
        self.error: FairwayError | None = None
        self.trace: tuple[float, str] | None = None
        self.is_over = False

    def hear(self, progress: Progress) -> None:
        """Take one message, or note that there are no more: the process has ended, or is about to.

        A killed process may leave half a message.
        """
        try:
            kind, value = self.pipe.recv()
        except (EOFError, OSError):
            self.is_over = True
            self.process.join(_END_S)
            return
        if kind in ("resumed", "advance"):
            getattr(progress, kind)(value)
        else:
            setattr(self, kind, value)

    @property
    def has_failed(self) -> bool:
        return self.is_over and self.process.exitcode != 0


def run_ranks(
    work: Work, request: Any, num_ranks: int, progress: Progress, *, on_cpu: bool = False
) -> Any:
    """Do work in `num_ranks` processes, with a GPU each where there are any, unless it is to be
    done `on_cpu`; the first's result.

    FairwayErrors come back as they were raised; WorkerLost if a worker died, RuntimeError with its
    trace if it met a bug.
    """
    has_gpus = torch.cuda.is_available() and not on_cpu
    if has_gpus and num_ranks > torch.cuda.device_count():
        raise UsageError(
            f"--workers {num_ranks}: this machine has {torch.cuda.device_count()} GPUs; "
            "ask for one worker a GPU"
        )
    with tempfile.TemporaryDirectory() as folder:
        members = [
            _start(work, request, _Place(rank, num_ranks, has_gpus), Path(folder) / "store")
            for rank in range(num_ranks)
        ]
        try:
            while any(not member.is_over for member in members):
                _hear(members, progress, timeout_s=None)
                if any(member.has_failed for member in members):
                    raise _failure(members, progress)
        finally:
            _end(members)
    return members[0].result


class _Place(NamedTuple):
    """A rank's place in its gang, and whether it has a GPU there."""

    rank: int
    num_ranks: int
    has_gpu: bool


def _start(work: Work, request: Any, place: _Place, store: Path) -> _Member:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    # Daemons: Python ends them too if this process leaves in a way that skips `_end`.
    process = context.Process(target=_rank, args=(work, request, place, store, theirs), daemon=True)
    process.start()
    theirs.close()  # or the end of the process would not end the pipe
    return _Member(process, ours)


def _hear(members: list[_Member], progress: Progress, timeout_s: float | None) -> None:
    pipes = {member.pipe: member for member in members if not member.is_over}
    for pipe in wait(list(pipes), timeout_s):
        pipes[pipe].hear(progress)  # type: ignore[index]


def _failure(members: list[_Member], progress: Progress) -> Exception:
    """The cause among the failures: what a rank says of itself, then who was killed."""
    deadline = time.monotonic() + _LAST_WORDS_S
    while time.monotonic() < deadline and any(not member.is_over for member in members):
        _hear(members, progress, timeout_s=0.05)
    failed = [member for member in members if member.has_failed]
    for member in failed:
        if member.error is not None:
            return member.error
    for member in failed:
        code = member.process.exitcode
        if code is not None and code < 0:
            return WorkerLost(
                f"worker {members.index(member)} of {len(members)} was killed by "
                f"{signal.Signals(-code).name}; run the same command again to go on"
            )
    # The first by the machine's clock: others fail because their peer has gone.
    traces = [
        (member.trace, members.index(member)) for member in failed if member.trace is not None
    ]
    if not traces:
        codes = ", ".join(str(member.process.exitcode) for member in failed)
        return WorkerLost(f"a worker ended with {codes} and said nothing; run the command again")
    (_, trace), number = min(traces)
    return RuntimeError(f"worker {number} of {len(members)} failed:\n{trace}")


def _end(members: list[_Member]) -> None:
    for member in members:
        member.process.terminate()
    for member in members:
        member.process.join(_END_S)
        if member.process.is_alive():
            member.process.kill()
            member.process.join()
        member.pipe.close()


def _rank(work: Work, request: Any, place: _Place, store: Path, caller: Connection) -> None:
    """One rank's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller answers an interrupt
    threading.Thread(target=_end_with_parent, daemon=True).start()
    rank, num_ranks, has_gpu = place
    status = 1
    try:
        device = torch.device("cuda", rank) if has_gpu else torch.device("cpu")
        if has_gpu:
            torch.cuda.set_device(device)
        torch.set_num_threads(max(1, torch.get_num_threads() // num_ranks))
        backend = "nccl" if has_gpu else "gloo"
        dist.init_process_group(backend, f"file://{store}", rank=rank, world_size=num_ranks)
        result = work(request, Ranks(rank, num_ranks, device), _Reporter(caller))
        caller.send(("result", result if rank == 0 else None))
        dist.destroy_process_group()
        status = 0
    except FairwayError as error:
        caller.send(("error", error))
    # Whatever else it is, the caller shall have its trace; nobody reads this process's stderr.
    except Exception:
        with suppress(OSError):
            caller.send(("trace", (time.monotonic(), traceback.format_exc())))
    caller.close()
    os._exit(status)  # without waiting for peers that hang in a collective


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
