"""Finding the processes of a running sweep and killing them, without a word to anyone."""

import os
import signal
from pathlib import Path


def processes_below(parent: int) -> list[int]:
    """The ids of all processes that descend from one, as /proc has them."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        children.setdefault(int(after_name[1]), []).append(int(path.parent.name))
    found, left = [], [parent]
    while left:
        below = children.get(left.pop(), [])
        found += below
        left += below
    return found


def holders_of(file: Path, pids: list[int]) -> list[int]:
    """Those of some processes that have a file open: of a rank's log, that rank."""
    found = []
    for pid in pids:
        try:
            opened = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        if str(file.resolve()) in opened:
            found.append(pid)
    return found


def titled(words: tuple[str, ...], pids: list[int]) -> list[int]:
    """Those of some processes whose command line, which Ray sets, has one of some words."""
    found = []
    for pid in pids:
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, UnicodeDecodeError):
            continue
        if any(word in line for word in words):
            found.append(pid)
    return found


def kill(pid: int) -> bool:
    """SIGKILL; False if there is no such process any more."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
