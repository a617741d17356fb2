"""Reading documents from text files: plain text or JSON lines, bare, .xz or .gz.

In plain text one or more blank lines separate documents; in JSON lines each line is an object
with a `text`. Reads line by line, so a file may be larger than memory. Every fault names the
file and the line.
"""

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

from trainer.errors import DataError

_JSON_SUFFIXES = {".jsonl", ".ndjson"}
# A line is held in memory, and a small compressed file can unpack to an endless one.
_MAX_LINE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Document:
    """One document's text, and the line (from 1) where it begins in its file."""

    text: str
    line: int


def read_documents(path: Path) -> Iterator[Document]:
    """Walk the documents of a file that are not blank, in order."""
    suffixes = [s for s in path.suffixes if s not in (".xz", ".gz")]
    is_json = bool(suffixes) and suffixes[-1] in _JSON_SUFFIXES
    lines = _lines(path)
    return _json_documents(path, lines) if is_json else _text_documents(lines)


def _text_documents(lines: Iterator[tuple[int, str]]) -> Iterator[Document]:
    paragraph: list[str] = []
    first = 1
    for number, line in lines:
        if line.strip():
            first = first if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield Document("\n".join(paragraph), first)
            paragraph = []
    if paragraph:
        yield Document("\n".join(paragraph), first)


def _json_documents(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[Document]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep or long"
            raise DataError(
                f"{path}: line {number}: not JSON ({reason}); write one object a line"
            ) from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise DataError(
                f'{path}: line {number}: no text; write {{"text": "…"}}, one document a line'
            )
        if any(0xD800 <= ord(char) < 0xE000 for char in text):
            raise DataError(
                f"{path}: line {number}: half a surrogate pair is no character; repair the text"
            )
        if text.strip():
            yield Document(text, number)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and decode the lines of a file, without their ends."""
    position = 0
    try:
        with _open(path) as file:
            number = 0
            while raw := file.readline(_MAX_LINE_BYTES + 1):
                number += 1
                if len(raw) > _MAX_LINE_BYTES:
                    raise DataError(
                        f"{path}: line {number}: longer than {_MAX_LINE_BYTES:,} bytes; break it up"
                    )
                yield number, _decode(path, raw, number, position)
                position += len(raw)
    except (lzma.LZMAError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: truncated or corrupted after {position:,} unpacked bytes; copy it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give a readable file") from error


def _open(path: Path) -> BufferedIOBase:
    if path.suffix == ".xz":
        return lzma.open(path)
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _decode(path: Path, raw: bytes, number: int, position: int) -> str:
    if number == 1:
        raw = raw.removeprefix(b"\xef\xbb\xbf")
    try:
        return raw.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: line {number}: not UTF-8 (byte {position + error.start:,} of the text); "
            f"convert the file to UTF-8"
        ) from error
