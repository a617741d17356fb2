"""One Python program, run where it can reach nothing but what it is handed.

An interpreter of its own without the user's site (`-I`), an empty folder, an environment of a few
names, none of Fairway's packages and no network: a network namespace of its own where the system
grants one, else every use of a socket from Python is refused. Not a jail against hostile code:
files that the user may read stay readable. So only code that is known is run.
"""

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Network = Literal["network namespace", "sockets refused"]
# Of the caller's environment, what a program needs to find its libraries and its devices.
PASSED = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "SYSTEMROOT")
_NAMESPACES = (("unshare", "--user", "--map-root-user", "--net", "--"), ("unshare", "--net", "--"))
# Beside the program, so that it cannot tell the difference but by trying.
_DOOR = """\
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"service", "trainer", "tune_spaces"}:
            raise ModuleNotFoundError(f"No module named {name!r} in the clean room", name=name)

def refuse(event, args):
    if event in {"socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo",
                 "socket.gethostbyname", "socket.gethostbyaddr"}:
        raise PermissionError("no network in the clean room")

sys.meta_path.insert(0, Absent())
sys.addaudithook(refuse)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True, slots=True)
class CleanRoom:
    """Where programs run. environment: the caller's, of which little is passed on."""

    environment: Mapping[str, str]

    def run(
        self,
        files: Mapping[str, bytes],
        words: Sequence[str],
        *,
        threads: int = 1,
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> subprocess.CompletedProcess[str]:
        """Run `words`, a program's name among `files` and its arguments, in a folder with `files`.

        threads: what OMP_NUM_THREADS is set to. device: cpu hides the GPUs, so that what was
        computed without is so again. The folder is gone afterwards.
        """
        with tempfile.TemporaryDirectory(prefix="fairway-clean-") as place:
            folder = Path(place)
            for name, content in files.items():
                (folder / name).write_bytes(content)
            return subprocess.run(
                [*_namespace(), sys.executable, "-I", "-B", "-c", _DOOR, *words],
                cwd=folder,
                env=self._environment(folder, threads, device),
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )

    def _environment(self, folder: Path, threads: int, device: str) -> dict[str, str]:
        own = {name: self.environment[name] for name in PASSED if name in self.environment}
        place = {name: str(folder) for name in ("HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR")}
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        return {**own, **place, **hidden, "OMP_NUM_THREADS": str(threads), "LANG": "C.UTF-8"}


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
