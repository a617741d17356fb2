"""A folder that somebody else may have made: listed and read, never trusted.

Only plain files with plain names count. A link, a pipe, a name that could be taken for something
else, a text that is too long, and JSON that two readers could understand differently are refused
in one line that names the file. Nothing here is executed.
"""

import json
import os
import stat
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from trainer.errors import DataError

README = "README.md"
SUBMISSION = "submission.json"
MAX_FILES = 1_000
MAX_DEPTH = 6
MAX_TEXT_BYTES = 1 << 20
MAX_LOG_BYTES = 1 << 25
_MAX_DIGITS = 20  # of a whole number: a seed has 19
_MAX_EXPONENT = 300
"""Of a number in JSON: beyond it a float is infinite or zero."""


@dataclass(frozen=True, slots=True)
class Folder:
    """What lies under a root: plain files by their path from it, with slashes, in sorted order."""

    root: Path
    names: tuple[str, ...]

    def path(self, name: str) -> Path:
        """The path of one of `names`."""
        assert name in self.names
        return self.root / name

    def at_top(self, suffix: str) -> list[str]:
        """The files right under the root whose names end so."""
        return [name for name in self.names if "/" not in name and name.endswith(suffix)]

    def read(self, name: str, limit: int) -> bytes:
        """Read a file of at most `limit` bytes; DataError where it is missing, or larger."""
        path = self.root / name
        if name not in self.names:
            raise DataError(f"{path}: no such file")
        try:
            # Without waiting for a pipe's writer, and not through a link put there meanwhile.
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        with os.fdopen(handle, "rb") as file:
            facts = os.fstat(handle)
            if not stat.S_ISREG(facts.st_mode):
                raise DataError(f"{path}: no plain file any more")
            if facts.st_size > limit:
                raise DataError(f"{path}: {facts.st_size:,} bytes; at most {limit:,} are read")
            return file.read(limit)

    def text(self, name: str, limit: int = MAX_TEXT_BYTES) -> str:
        """Read UTF-8 text; DataError as `read`, and where it is no such text."""
        content = self.read(name, limit)
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.root / name}: not UTF-8 text (byte {error.start})") from error

    def document(self, name: str) -> dict[str, Any]:
        """Read a JSON object; numbers with a point are Decimals, so that their digits are known."""
        return read_object(self.text(name), str(self.root / name))


def open_folder(root: Path) -> Folder:
    """List a folder; DataError where it holds anything but plain files and folders of them."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    return Folder(root, tuple(sorted(_names(root, "", 1))))


def _names(folder: Path, prefix: str, depth: int) -> list[str]:
    found: list[str] = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        shown = f"{folder}: {entry.name!r}"
        if not entry.name.isprintable():
            raise DataError(f"{shown}: a name that can be printed is needed; remove it")
        if entry.is_symlink():
            raise DataError(f"{shown} is a link; put the file itself there")
        if entry.is_dir():
            if depth == MAX_DEPTH:
                raise DataError(f"{shown}: folders nest more than {MAX_DEPTH} deep")
            found += _names(Path(entry.path), f"{prefix}{entry.name}/", depth + 1)
        elif entry.is_file():
            found.append(f"{prefix}{entry.name}")
        else:
            raise DataError(f"{shown} is neither a file nor a folder; remove it")
        if len(found) > MAX_FILES:
            raise DataError(f"{folder}: more than {MAX_FILES} files")
    return found


def read_object(text: str, where: str) -> dict[str, Any]:
    """Parse JSON that has one meaning only; DataError names `where`."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in items]
        if again := next((key for key in keys if keys.count(key) > 1), None):
            raise ValueError(f"key {again!r} is given twice")
        return dict(items)

    def constant(word: str) -> Any:
        raise ValueError(f"{word} is no number of JSON")

    def number(word: str) -> Decimal:
        value = Decimal(word)
        if len(word) > 40 or abs(value.adjusted()) > _MAX_EXPONENT:
            raise ValueError(f"{word[:20]}… is no number to work with")
        return value

    def whole(word: str) -> int:
        if len(word) > _MAX_DIGITS:
            raise ValueError(f"{word[:20]}… is no number to work with")
        return int(word)

    try:
        data = json.loads(
            text,
            object_pairs_hook=pairs,
            parse_constant=constant,
            parse_float=number,
            parse_int=whole,
        )
        json.dumps(data, default=str, ensure_ascii=False).encode()
    except (ValueError, RecursionError, ArithmeticError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"{where}: not readable as JSON ({reason})") from error
    if not isinstance(data, dict):
        raise DataError(f"{where}: expected a JSON object")
    return data
