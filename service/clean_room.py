"""One Python program, run where it can reach nothing but what it is handed.

An interpreter of its own without the user's site (`-I`), an empty folder, an environment of a few
names, none of Fairway's packages and no network: a network namespace of its own where the system
grants one, and in any case every use of a socket from Python is refused. Nor may it start another
process, but where it runs on a GPU, whose kernels are built by compilers: those have sockets where
no namespace holds them. It ends when its time or its memory is used up. Not a jail against hostile
code: files that the user may read stay readable, and C reaches what Python may not. So only code
that is known is run.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

MAX_S = 86_400.0
Network = Literal["network namespace", "sockets refused"]
# Of the caller's environment, what a program needs to find its libraries and its devices.
PASSED = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "SYSTEMROOT")
_LEAST_BYTES = 1 << 33  # torch alone maps some of it
_NAMESPACES = (("unshare", "--user", "--map-root-user", "--net", "--"), ("unshare", "--net", "--"))
# Beside the program, so that it cannot tell the difference but by trying.
_DOOR = """\
import resource, runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"service", "trainer", "tune_spaces"}:
            raise ModuleNotFoundError(f"No module named {name!r} in the clean room", name=name)

harmless = {"socket.__new__", "socket.gethostname"}
others = {"os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile",
          "os.system", "pty.spawn", "subprocess.Popen"}

def refuse(event, args):
    if event.startswith("socket.") and event not in harmless:
        raise PermissionError("no network in the clean room")
    if event in others and is_alone:
        raise PermissionError("no other process in the clean room")

is_alone, memory = sys.argv[1] == "alone", int(sys.argv[2])
if memory:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
sys.meta_path.insert(0, Absent())
sys.addaudithook(refuse)
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True, slots=True)
class CleanRoom:
    """Where programs run. environment: the caller's, of which little is passed on. max_s: no run
    takes longer. max_bytes: of a program's memory on a CPU; a GPU's driver claims far more than it
    uses."""

    environment: Mapping[str, str]
    max_s: float = MAX_S
    max_bytes: int = field(default_factory=lambda: _machine_bytes())

    def run(
        self,
        files: Mapping[str, bytes],
        words: Sequence[str],
        *,
        threads: int = 1,
        device: Literal["cpu", "cuda"] = "cpu",
        timeout_s: float = MAX_S,
    ) -> subprocess.CompletedProcess[str]:
        """Run `words`, a program's name among `files` and its arguments, in a folder with `files`.

        threads: what OMP_NUM_THREADS is set to. device: cpu hides the GPUs, so that what was
        computed without is so again. The folder is gone afterwards. TimeoutError where it did not
        end by itself.
        """
        with tempfile.TemporaryDirectory(prefix="fairway-clean-") as place:
            folder = Path(place)
            for name, content in files.items():
                (folder / name).write_bytes(content)
            held = ("alone", str(self.max_bytes)) if device == "cpu" else ("with others", "0")
            seconds = min(timeout_s, self.max_s)
            try:
                return subprocess.run(
                    [*_namespace(), sys.executable, "-I", "-B", "-c", _DOOR, *held, *words],
                    cwd=folder,
                    env=self._environment(folder, threads, device),
                    capture_output=True,
                    text=True,
                    errors="replace",
                    check=False,
                    timeout=seconds,
                )
            except subprocess.TimeoutExpired as error:
                raise TimeoutError(f"no end within {seconds:,.0f} s") from error

    def _environment(self, folder: Path, threads: int, device: str) -> dict[str, str]:
        own = {name: self.environment[name] for name in PASSED if name in self.environment}
        place = {name: str(folder) for name in ("HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR")}
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        return {**own, **place, **hidden, "OMP_NUM_THREADS": str(threads), "LANG": "C.UTF-8"}


def _machine_bytes() -> int:
    """The machine's memory; what is mapped besides is allowed on a small one."""
    own = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(own, _LEAST_BYTES)


def network() -> Network:
    """How the network is kept away on this system."""
    return "network namespace" if _namespace() else "sockets refused"


@cache
def _namespace() -> tuple[str, ...]:
    """The command in front that gives a process a network of its own, empty where none may."""
    for command in _NAMESPACES:
        try:
            tried = subprocess.run([*command, "true"], capture_output=True, check=False)
        except OSError:  # no such program here
            continue
        if tried.returncode == 0:
            return command
    return ()
