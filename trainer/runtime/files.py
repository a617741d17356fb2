"""Writing files so that a reader never meets half of one, and reading them with a checksum."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.errors import DataError


def sha256_file(path: Path) -> str:
    """Hash a file's bytes; 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Write to a temporary sibling, flush it to disk, and rename it over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON; NaN and infinity are refused rather than written."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def link_files(source: Path, target: Path, names: Sequence[str]) -> None:
    """Let `target` hold the named files and folders of `source` as well: the same files where a
    file system can, copies elsewhere. What an earlier attempt left there is replaced."""
    for name in names:
        for path in [source / name, *sorted((source / name).rglob("*"))]:
            placed = target / path.relative_to(source)
            if path.is_dir():
                shutil.rmtree(placed, ignore_errors=True)
                placed.mkdir(parents=True)
                continue
            placed.unlink(missing_ok=True)
            try:
                os.link(path, placed)
            except OSError:  # another file system, or one without links
                shutil.copy2(path, placed)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Generator[None]:
    """Hold an exclusive lock on a file for as long as the block, or the process, lasts.

    The lock is the kernel's (flock), so a killed holder frees it by dying. BlockingIOError where
    another holds it and `wait` is off.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def read_json(path: Path) -> Any:
    """Read JSON; DataError names the file when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from error
