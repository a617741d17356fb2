"""Weights files taken apart and put together again with a lie in them."""

from binascii import crc32
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.finalize.artifact import BESIDE, HEADER_LENGTH, KINDS, MAGIC, PREFIX, VERSION
from trainer.finalize.compress import compress, decompress
from trainer.specs.final import Brotli, Lzma, RangeCoder, Zlib, Zstd

QUICK = {
    spec.kind: spec
    for spec in (Zstd(level=1), Brotli(level=1), Lzma(level=0), Zlib(level=1), RangeCoder())
}


@dataclass(frozen=True)
class Parts:
    """What a weights file is made of; `columns` are the integers that its `blobs` stand for."""

    kind: str
    header: bytes
    payload: bytes
    blobs: bytes = b""
    columns: bytes = b""

    @property
    def content(self) -> bytes:
        return HEADER_LENGTH.pack(len(self.header)) + self.header + self.payload


def take_apart(path: Path, columns: bytes = b"") -> Parts:
    """Decode a good file."""
    data = path.read_bytes()
    _, _, kind, length, content_bytes, _ = PREFIX.unpack_from(data)
    frame, blobs = data[PREFIX.size :][:length], data[PREFIX.size + length :]
    inner = BESIDE.kind if KINDS[kind] == "range" else KINDS[kind]
    content = bytes(decompress(frame, inner, content_bytes, str(path)))
    start = HEADER_LENGTH.size + HEADER_LENGTH.unpack_from(content)[0]
    return Parts(KINDS[kind], content[HEADER_LENGTH.size : start], content[start:], blobs, columns)


def put_together(path: Path, parts: Parts, content: bytes | None = None, **claims: Any) -> Path:
    """Write a file whose frame is sound; the prefix tells the truth but for the claims."""
    content = parts.content if content is None else content
    general = QUICK[BESIDE.kind if parts.kind == "range" else parts.kind]
    assert not isinstance(general, RangeCoder)
    frame = claims.pop("frame", None) or compress(content, general)
    prefix = {
        "magic": MAGIC,
        "version": VERSION,
        "kind": KINDS.index(parts.kind),
        "frame_bytes": len(frame),
        "content_bytes": len(content),
        "checksum": crc32(parts.columns, crc32(content)),
    }
    prefix |= claims
    path.write_bytes(PREFIX.pack(*prefix.values()) + frame + parts.blobs)
    return path
