"""What a machine has that a sweep needs: GPUs, disk, clocks, shared memory. Reads, decides nothing.

Without torch or Ray, so that any process of any node can call it. `preflight` judges.
"""

import csv
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from service.attention import Attention, Question, ask
from trainer.runtime.environment import visible_gpus

SHARED_MEMORY = Path("/dev/shm")
ANSWER_S = 30.0  # a driver that hangs is one more that does not answer
_FIELDS = ("index", "uuid", "name", "driver_version", "memory.total", "memory.used")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A visible GPU. Memory in MiB, as the driver counts it."""

    index: int
    uuid: str
    name: str
    driver: str
    memory_mib: int
    used_mib: int


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine as it is now.

    gpu_fault, store_fault: why GPUs, or the place of the store, could not be read. skew_s: how far
    the system clock is ahead of the file system's that the store lies on. open_files: the most
    that a process may have. sees_mark: whether the file it was asked for is there.
    """

    host: str
    gpus: tuple[Gpu, ...]
    gpu_fault: str | None
    store: Path
    store_fault: str | None
    free_bytes: int | None
    skew_s: float | None
    tick_s: float
    """The resolution of the monotonic clock."""
    shared_memory_bytes: int | None
    open_files: int
    sees_mark: bool | None = None
    attention: Attention | None = None


def look(
    store: Path,
    question: Question | None = None,
    mark: Path | None = None,
    *,
    hidden_gpus: bool = False,
) -> Machine:
    """Read this machine. `store` need not exist yet: the folder it would be made in counts.

    With a question, attention is tried in a process of its own; `mark` is a file to look for.
    hidden_gpus: those too that CUDA_VISIBLE_DEVICES hides, as Ray does from a task without one.
    """
    gpus, gpu_fault = _gpus()
    free_bytes = skew_s = store_fault = None
    place = _nearest(store)
    try:
        free_bytes = shutil.disk_usage(place).free
        skew_s = _skew(place)
    except OSError as error:
        store_fault = f"{place}: {error.strerror}"
    return Machine(
        host=socket.gethostname(),
        gpus=gpus if hidden_gpus else _visible(gpus),
        gpu_fault=gpu_fault,
        store=store,
        store_fault=store_fault,
        free_bytes=free_bytes,
        skew_s=skew_s,
        tick_s=time.get_clock_info("monotonic").resolution,
        shared_memory_bytes=_shared_memory(),
        open_files=_open_files(),
        sees_mark=None if mark is None else mark.is_file(),
        attention=None if question is None else ask(question),
    )


def _gpus() -> tuple[tuple[Gpu, ...], str | None]:
    """The GPUs by the driver's own tool; and why it gave none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S)
    except FileNotFoundError:
        return (), None  # no driver, so no GPU
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), f"nvidia-smi: {error}"
    if done.returncode:
        words = (done.stdout + done.stderr).strip() or f"exit {done.returncode}"
        return (), f"nvidia-smi: {words.splitlines()[0]}"
    rows = csv.reader(done.stdout.splitlines(), skipinitialspace=True)
    found = [
        Gpu(int(index), uuid, name, driver, _mib(total), _mib(used))
        for index, uuid, name, driver, total, used in rows
    ]
    return tuple(found), None


def _mib(text: str) -> int:
    return int(text) if text.isdigit() else 0  # "[N/A]" where memory is the machine's own


def _visible(gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """Those that CUDA_VISIBLE_DEVICES leaves, which the tool does not heed and CUDA and Ray do."""
    named = visible_gpus()
    if named is None:
        return gpus
    found: list[Gpu] = []
    for name in named:
        match = [gpu for gpu in gpus if str(gpu.index) == name or gpu.uuid.startswith(name)]
        if not match:
            break  # CUDA sees nothing behind a name that it does not know
        found.append(match[0])
    return tuple(found)


def _nearest(path: Path) -> Path:
    """The path itself, or the first above it that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def _skew(folder: Path) -> float:
    """Seconds by which the system clock is ahead of the file system's; OSError if it is not
    writable."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".fairway-") as file:
        before = time.time()
        file.write(b"\0")
        file.flush()
        os.fsync(file.fileno())  # a file system over the network has its own clock, at its own end
        written = Path(file.name).stat().st_mtime
        after = time.time()
    # Coarse stamps lie a few ms before the write; anything within is no skew.
    return before - written if written < before else min(0.0, after - written)


def _open_files() -> int:
    """The hard limit: Ray raises its processes' soft one to it, as far as 65,536 (ray 2.60)."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard


def _shared_memory() -> int | None:
    """The size of /dev/shm; None where there is none, as on macOS."""
    return shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else None
