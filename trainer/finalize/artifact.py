"""The weights file: its bytes, its writer, and a reader that trusts none of them.

Owns the format that docs/artifact-format.md describes. No pickle, no code, no time stamp: equal
tensors give equal bytes. What a tensor's form should be is decided in `trainer.finalize.quantize`.
"""

import struct
from binascii import crc32
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from trainer.blueprint import blueprint
from trainer.errors import DataError, UsageError
from trainer.finalize.artifact_header import (
    Row,
    WeightsHeader,
    check_shapes,
    header_bytes,
    parse_header,
)
from trainer.finalize.artifact_payload import (
    LENGTH_BYTES,
    Side,
    by_columns,
    check_integers,
    check_side,
    from_columns,
    integer_rows,
    pack_lengths,
    pack_side,
    side_bytes,
    side_of,
    unpack_lengths,
    unpack_side,
)
from trainer.finalize.artifact_shares import Written, order0_bytes, share
from trainer.finalize.compress import compress, decompress, peek
from trainer.finalize.stored import Floats, Quantized, Stored, restore
from trainer.runtime.files import write_bytes
from trainer.sizes import tensor_sizes
from trainer.specs.final import Brotli, Compress, RangeCoder
from trainer.specs.model import ModelSpec

MAGIC: Final = b"FWTS"
VERSION: Final = 2
# Magic, version, place in KINDS, length of the frame, length and crc32 of its content.
PREFIX: Final = struct.Struct("<4sBBIII")
KINDS: Final = ("zstd", "brotli", "lzma", "zlib", "range")
HEADER_LENGTH: Final = struct.Struct("<I")
MAX_CONTENT_BYTES: Final = 2**30
MAX_HEADER_BYTES: Final = 2**20
BLOCK_ENTRIES: Final = 2**18
# What lies beside coded integers: of a trained pr414's 392,529 bytes (sd12.85) brotli makes
# 235,636, xz 237,796, zlib 247,209, zstd 257,908.
BESIDE: Final = Brotli()
_FIX = "finalize the model again"


@dataclass(frozen=True, slots=True, eq=False)
class _File:
    """A file taken apart by its prefix; nothing is decoded."""

    where: str
    kind: str
    frame: memoryview
    blobs: memoryview
    content_bytes: int
    checksum: int

    @property
    def is_coded(self) -> bool:
        """Whether the integers lie behind the frame instead of in it."""
        return self.kind == "range"

    @property
    def frame_kind(self) -> str:
        return BESIDE.kind if self.is_coded else self.kind


def write_weights(
    path: Path,
    model: ModelSpec,
    tensors: Mapping[str, Stored],
    spec: Compress,
    tokenizer_sha256: str,
) -> Written:
    """Write the file in one step and say what it takes; DataError when a tensor misfits.

    What could not be read back is not written.
    """
    where = str(path)
    check_shapes({name: tuple(_tensor(t).shape) for name, t in tensors.items()}, model, where)
    table = tuple(_row(size.name, tensors[size.name]) for size in tensor_sizes(blueprint(model)))
    header = header_bytes(model, table, tokenizer_sha256)
    parse_header(header, where)
    rows, side = integer_rows(table), side_of(tensors)
    check_side(side, where)
    matrices = [part.q.numpy() for row in rows if isinstance(part := tensors[row.name], Quantized)]
    for row, q in zip(rows, matrices, strict=True):
        check_integers(q, row, where)
    head, beside = HEADER_LENGTH.pack(len(header)) + header, pack_side(table, side)
    columns, blobs = b"".join(map(by_columns, matrices)), list[bytes]()
    if len(head) + len(beside) + len(columns) > MAX_CONTENT_BYTES:
        raise DataError(f"{where}: the tensors exceed {MAX_CONTENT_BYTES} bytes; {_FIX}")
    if isinstance(spec, RangeCoder):
        blobs = _encode(rows, matrices, side)
        content, general = head + pack_lengths(blobs) + beside, BESIDE
        checksum = crc32(columns, crc32(content))
    else:
        content, general = head + beside + columns, spec
        checksum = crc32(content)
    frame = compress(content, general)
    kind = KINDS.index(spec.kind)
    prefix = PREFIX.pack(MAGIC, VERSION, kind, len(frame), len(content), checksum)
    file = b"".join((prefix, frame, *blobs))
    write_bytes(path, file)
    weights = {"": float(len(compress(head, general)))}
    for row in table:
        weights[row.name] = order0_bytes(tensors[row.name], integers=not blobs)
    by_tensor = share(len(frame), weights)
    by_tensor[""] += PREFIX.size
    for row, blob in zip(rows, blobs, strict=False):
        by_tensor[row.name] += len(blob)
    return Written(len(file), by_tensor)


def read_weights(path: Path) -> tuple[ModelSpec, dict[str, Tensor], WeightsHeader]:
    """Read a weights file: its model, its tensors as float32 in state-dict order, its header.

    Every claim is checked before it costs memory; any fault is one DataError that starts with
    the path.
    """
    file = _open(path)
    start, claimed = _peek_header(file)
    model, table, tokenizer_sha256 = parse_header(claimed, file.where)
    rows = integer_rows(table)
    beside, coded = start + side_bytes(table), sum(row.numel for row in rows)
    expected = beside + (LENGTH_BYTES * len(rows) if file.is_coded else coded)
    if file.content_bytes != expected or beside + coded > MAX_CONTENT_BYTES:
        raise DataError(
            f"{file.where}: the frame holds {file.content_bytes} bytes, its tensors need "
            f"{expected}; {_FIX}"
        )
    content = memoryview(decompress(file.frame, file.frame_kind, expected, file.where))
    side, matrices = (_coded if file.is_coded else _plain)(file, content, start, table)
    state: dict[str, Tensor] = {}
    for row, q in zip(rows, matrices, strict=True):
        check_integers(q, row, file.where)
        repair = side.low_rank.get(row.name)
        stored = Quantized(torch.from_numpy(q), side.scales[row.name], row.bits, repair)
        state[row.name] = _restore(stored)
    state |= {name: restore(Floats(tensor)) for name, tensor in side.floats.items()}
    header = WeightsHeader(VERSION, file.kind, tokenizer_sha256, beside + coded, table)
    return model, {row.name: state[row.name] for row in table}, header


def _plain(
    file: _File, content: memoryview, start: int, table: Sequence[Row]
) -> tuple[Side, Iterator[np.ndarray]]:
    """Take apart a content that holds everything."""
    _check_sum(file, crc32(content))
    side = unpack_side(content[start:], table)
    check_side(side, file.where)
    return side, from_columns(content[start + side_bytes(table) :], integer_rows(table))


def _coded(
    file: _File, content: memoryview, start: int, table: Sequence[Row]
) -> tuple[Side, Iterator[np.ndarray]]:
    """Decode integers that lie behind the frame, by the scales inside it."""
    rows = integer_rows(table)
    lengths = unpack_lengths(content[start:], len(rows))
    if sum(lengths) != len(file.blobs):
        raise DataError(
            f"{file.where}: {len(file.blobs)} bytes behind the frame, "
            f"its tensors take {sum(lengths)}; {_FIX}"
        )
    side = unpack_side(content[start + LENGTH_BYTES * len(rows) :], table)
    check_side(side, file.where)
    ends = np.cumsum(lengths)
    blobs = [bytes(file.blobs[end - size : end]) for size, end in zip(lengths, ends, strict=True)]
    coder = _coder()
    shapes = [
        coder.Shape(row.name, *row.shape, row.bits, side.scales[row.name].numpy()) for row in rows
    ]
    matrices = coder.decode(blobs, shapes, file.where)
    checksum = crc32(content)
    for q in matrices:
        checksum = crc32(by_columns(q), checksum)
    _check_sum(file, checksum)
    return side, iter(matrices)


def _encode(rows: Sequence[Row], matrices: Sequence[np.ndarray], side: Side) -> list[bytes]:
    coder = _coder()
    return coder.encode(
        [
            coder.Integers(row.name, q, row.bits, side.scales[row.name].numpy())
            for row, q in zip(rows, matrices, strict=True)
        ]
    )


def _coder() -> Any:
    """Our own coder, whose library no file of another kind needs."""
    try:
        from trainer.finalize import coder
    except ImportError as error:
        raise UsageError(
            "final.compress.kind=range: the constriction package is missing and nothing replaces "
            "it; install it or name another kind"
        ) from error
    return coder


def _restore(stored: Quantized) -> Tensor:
    """Restore a matrix by blocks of rows, so that little is needed beside it."""
    q, scale, repair = stored.q, stored.scale, stored.low_rank
    weight = torch.empty(q.shape)
    step = max(1, BLOCK_ENTRIES // q.shape[1])
    for at in range(0, len(q), step):
        rows = slice(at, at + step)
        part = repair if repair is None else replace(repair, a=repair.a[rows])
        weight[rows] = restore(replace(stored, q=q[rows], scale=scale[rows], low_rank=part))
    return weight


def _check_sum(file: _File, checksum: int) -> None:
    if checksum != file.checksum:
        raise DataError(f"{file.where}: the content does not match its checksum; {_FIX}")


def _open(path: Path) -> _File:
    try:
        size = path.stat().st_size
        if size > MAX_CONTENT_BYTES:
            raise DataError(f"{path}: {size} bytes exceed {MAX_CONTENT_BYTES}; {_FIX}")
        data = memoryview(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; name a weights file") from error
    if len(data) < PREFIX.size or data[: len(MAGIC)] != MAGIC:
        raise DataError(f"{path}: not a weights file; {_FIX}")
    _, version, kind, length, content_bytes, checksum = PREFIX.unpack_from(data)
    if version != VERSION:
        raise DataError(f"{path}: format version {version}, this code reads {VERSION}; {_FIX}")
    if kind >= len(KINDS):
        raise DataError(f"{path}: compressor {kind} is unknown; {_FIX}")
    frame, blobs = data[PREFIX.size :][:length], data[PREFIX.size + length :]
    file = _File(str(path), KINDS[kind], frame, blobs, content_bytes, checksum)
    if len(frame) != length or (blobs and not file.is_coded):
        raise DataError(
            f"{path}: the frame has {len(data) - PREFIX.size} bytes, the prefix says {length}; "
            f"{_FIX}"
        )
    return file


def _peek_header(file: _File) -> tuple[int, bytes]:
    """Return where the header ends, and the header, decoding no more than that."""
    head = peek(file.frame, file.frame_kind, HEADER_LENGTH.size, file.where)
    if len(head) < HEADER_LENGTH.size:
        raise DataError(f"{file.where}: the content ends inside the header; {_FIX}")
    start = HEADER_LENGTH.size + HEADER_LENGTH.unpack(head)[0]
    if start > min(MAX_HEADER_BYTES, file.content_bytes):
        raise DataError(f"{file.where}: a header of {start} bytes is not plausible; {_FIX}")
    return start, peek(file.frame, file.frame_kind, start, file.where)[HEADER_LENGTH.size :]


def _row(name: str, stored: Stored) -> Row:
    tensor = _tensor(stored)
    if not isinstance(stored, Quantized):
        return Row(name, tuple(tensor.shape), 8 * tensor.element_size())
    rank = 0 if stored.low_rank is None else stored.low_rank.a.shape[1]
    return Row(name, tuple(tensor.shape), stored.bits, rank)


def _tensor(stored: Stored) -> Tensor:
    return stored.q if isinstance(stored, Quantized) else stored.tensor
