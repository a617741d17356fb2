"""A dataset folder appears whole or not at all: it is built beside its place and renamed.

A lock file beside the folder keeps two makers apart; readers need none.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from trainer.data.manifest import MANIFEST_FILE
from trainer.errors import UsageError
from trainer.runtime import files

# The disk's faults, which a user can mend; other system errors are ours.
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Let one process at a time make or change the dataset `out`; the others wait."""
    with ExitStack() as stack:
        with _writing(out):
            stack.enter_context(files.locked(out.with_name(f".{out.name}.lock")))
        yield


@contextmanager
def staging_folder(out: Path, *, replace: bool) -> Iterator[Path]:
    """Give a hidden sibling of `out` to build in; it is removed unless it was published.

    UsageError if `out` exists and may not be replaced, or is no dataset, or cannot be written.
    """
    if out.exists() and not (replace and (out / MANIFEST_FILE).exists()):
        raise UsageError(f"{out}: exists already; remove it or choose another name")
    folder = _sibling(out, "new")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with _writing(out):
            folder.mkdir(parents=True)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, out: Path, *, replace: bool) -> None:
    """Rename a finished folder to `out`; with `replace` an older dataset there gives way."""
    old = _sibling(out, "old")
    if replace and out.exists():
        out.rename(old)
    try:
        folder.rename(out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise UsageError(f"{out}: another process made it meanwhile; use that one") from error
    parent = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise UsageError(
            f"{out}: cannot write ({error.strerror}); make room or choose another place"
        ) from error


def _sibling(out: Path, suffix: str) -> Path:
    return out.with_name(f".{out.name}.{os.getpid()}.{suffix}")
