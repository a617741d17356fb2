"""The weights file: its bytes, its writer, and a reader that trusts none of them.

Owns the format that docs/artifact-format.md describes. No pickle, no code, no time stamp: equal
tensors give equal bytes. What a tensor's form should be is decided in `trainer.finalize.quantize`.
"""

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from trainer.blueprint import blueprint
from trainer.codec import canonical, dump, parse
from trainer.errors import DataError, UsageError
from trainer.finalize import compress as zstd
from trainer.finalize.stored import Floats, Quantized, Stored, restore
from trainer.quant import levels
from trainer.runtime.files import write_bytes
from trainer.sizes import tensor_sizes
from trainer.specs.final import Zstd
from trainer.specs.model import ModelSpec

MAGIC: Final = b"FWTS"
VERSION: Final = 1
PREFIX: Final = struct.Struct("<4sB3xQ")  # magic, version, three zero bytes, length of the frame
HEADER_LENGTH: Final = struct.Struct("<I")
MAX_CONTENT_BYTES: Final = 2**30
MAX_HEADER_BYTES: Final = 2**20
MAX_WIDTH: Final = 2**24  # of any one dimension; keeps a claimed spec's arithmetic small
MAX_VISITS: Final = 2**16  # of layers that are run several times
INTEGER_BITS: Final = range(2, 9)
FLOATS: Final = {16: (np.dtype("<f2"), torch.float16), 32: (np.dtype("<f4"), torch.float32)}

_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIX = "finalize the model again"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the tensor table. bits 2..8: integers with row scales; 16, 32: floats."""

    name: str
    shape: tuple[int, ...]
    bits: int


@dataclass(frozen=True, slots=True)
class WeightsHeader:
    """What a weights file says about itself."""

    version: int
    tokenizer_sha256: str
    content_bytes: int
    table: tuple[Row, ...]


def write_weights(
    path: Path,
    model: ModelSpec,
    tensors: Mapping[str, Stored],
    compress: Zstd,
    tokenizer_sha256: str,
) -> int:
    """Write the file in one step and return its size in bytes; DataError when a tensor misfits."""
    where = str(path)
    table = tuple(
        Row(size.name, tuple(_tensor(tensors[size.name]).shape), _bits(tensors[size.name]))
        for size in tensor_sizes(blueprint(model))
        if size.name in tensors
    )
    check_shapes({name: tuple(_tensor(t).shape) for name, t in tensors.items()}, model, where)
    header = canonical(
        {
            "model": dump(model),
            "tensors": [[row.name, row.shape, row.bits] for row in table],
            "tokenizer_sha256": tokenizer_sha256,
        }
    ).encode()
    _parse_header(header, where)  # what could not be read back is not written
    content = HEADER_LENGTH.pack(len(header)) + header + _pack(table, tensors)
    if len(content) > MAX_CONTENT_BYTES:
        raise DataError(f"{where}: {len(content)} bytes of content exceed {MAX_CONTENT_BYTES}")
    frame = zstd.compress(content, compress)
    write_bytes(path, PREFIX.pack(MAGIC, VERSION, len(frame)) + frame)
    return PREFIX.size + len(frame)


def read_weights(path: Path) -> tuple[ModelSpec, dict[str, Tensor], WeightsHeader]:
    """Read a weights file: its model, its tensors as float32 in state-dict order, its header.

    Every claim is checked before it costs memory; any fault is one DataError that starts with
    the path.
    """
    where = str(path)
    frame = _read_frame(path)
    declared = zstd.check_frame(frame, MAX_CONTENT_BYTES, where)
    head = zstd.peek(frame, HEADER_LENGTH.size, where)
    if len(head) < HEADER_LENGTH.size:
        raise DataError(f"{where}: the content ends inside the header; {_FIX}")
    start = HEADER_LENGTH.size + HEADER_LENGTH.unpack(head)[0]
    if start > MAX_HEADER_BYTES or start > declared:
        raise DataError(f"{where}: a header of {start} bytes is not plausible; {_FIX}")
    claimed = zstd.peek(frame, start, where)[HEADER_LENGTH.size :]
    model, table, tokenizer_sha256 = _parse_header(claimed, where)
    expected = start + sum(_payload_bytes(row) for row in table)
    if declared != expected:
        raise DataError(
            f"{where}: the frame declares {declared} bytes, its tensors need {expected}; {_FIX}"
        )
    content = zstd.decompress(frame, expected, where)
    tensors = _unpack(memoryview(content)[start:], table, where)
    header = WeightsHeader(VERSION, tokenizer_sha256, expected, table)
    return model, {row.name: restore(tensors[row.name]) for row in table}, header


def check_shapes(shapes: Mapping[str, Sequence[int]], model: ModelSpec, where: str) -> None:
    """Raise DataError unless the names and shapes are exactly those of the model's parameters."""
    wanted = {size.name: size.shape for size in tensor_sizes(blueprint(model))}
    for name in shapes:
        if name not in wanted:
            raise DataError(f"{where}: tensor {name!r} is not a parameter of the model; {_FIX}")
    for name, shape in wanted.items():
        if name not in shapes:
            raise DataError(f"{where}: tensor {name!r} is missing; {_FIX}")
        if tuple(shapes[name]) != shape:
            raise DataError(
                f"{where}: tensor {name!r} has shape {tuple(shapes[name])}, "
                f"the model needs {shape}; {_FIX}"
            )


def _read_frame(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_CONTENT_BYTES:
            raise DataError(f"{path}: {size} bytes exceed {MAX_CONTENT_BYTES}; {_FIX}")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; name a weights file") from error
    if len(data) < PREFIX.size or not data.startswith(MAGIC):
        raise DataError(f"{path}: not a weights file; {_FIX}")
    _, version, length = PREFIX.unpack_from(data)
    if version != VERSION:
        raise DataError(f"{path}: format version {version}, this code reads {VERSION}; {_FIX}")
    if any(data[len(MAGIC) + 1 : len(MAGIC) + 4]) or length != len(data) - PREFIX.size:
        raise DataError(
            f"{path}: the frame has {len(data) - PREFIX.size} bytes, the prefix says {length}; "
            f"{_FIX}"
        )
    return data[PREFIX.size :]


def _parse_header(header: bytes, where: str) -> tuple[ModelSpec, tuple[Row, ...], str]:
    """Check everything that a header claims; nothing is allocated by its numbers."""
    try:
        claims = json.loads(header)
        # One comparison refuses repeated keys, NaN, nulls, odd spacing and odd escapes.
        is_canonical = canonical(claims).encode() == header
    except (ValueError, RecursionError, OverflowError) as error:
        raise DataError(f"{where}: the header is not JSON; {_FIX}") from error
    keys = {"model", "tensors", "tokenizer_sha256"}
    if not is_canonical or not isinstance(claims, dict) or set(claims) != keys:
        raise DataError(f"{where}: the header is not the canonical JSON of {sorted(keys)}; {_FIX}")
    digest = claims["tokenizer_sha256"]
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise DataError(f"{where}: tokenizer_sha256 is not 64 hexadecimal digits; {_FIX}")
    table = _parse_table(claims["tensors"], where)
    model = _parse_model(claims["model"], len(table), where)
    check_shapes({row.name: row.shape for row in table}, model, where)
    if [row.name for row in table] != [size.name for size in tensor_sizes(blueprint(model))]:
        raise DataError(f"{where}: the tensors are out of order; {_FIX}")
    return model, table, digest


def _parse_table(claims: Any, where: str) -> tuple[Row, ...]:
    rows: dict[str, Row] = {}
    for claim in claims if isinstance(claims, list) else [None]:
        match claim:
            case [str(name), [*shape], int(bits)] if all(
                type(width) is int and 0 < width <= MAX_WIDTH for width in shape
            ):
                row = Row(name, tuple(shape), bits)
            case _:
                raise DataError(f"{where}: a tensor is not [name, shape, bits]; {_FIX}")
        if name in rows:
            raise DataError(f"{where}: tensor {name!r} is given twice; {_FIX}")
        if not (bits in FLOATS or (bits in INTEGER_BITS and len(shape) == 2)):
            raise DataError(f"{where}: tensor {name!r} with {bits} bits per entry; {_FIX}")
        rows[name] = row
    return tuple(rows.values())


def _parse_model(claims: Any, num_tensors: int, where: str) -> ModelSpec:
    try:
        model = parse(ModelSpec, claims, "model")
    except (UsageError, RecursionError, OverflowError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise DataError(f"{where}: {reason}; {_FIX}") from error
    # Before the spec is resolved: a billion claimed layers would take as many plans.
    widths = (model.vocab_size, model.dim, model.mlp.mult, model.attention.num_heads)
    again = model.recurrence
    visits = 0 if again is None else again.passes * (again.last - again.first + 1)
    is_large = max(widths) > MAX_WIDTH or model.num_layers > num_tensors or visits > MAX_VISITS
    if is_large:
        raise DataError(f"{where}: the model is larger than its tensors; {_FIX}")
    if model != model.exported():
        raise DataError(f"{where}: the model has parts that only training uses; {_FIX}")
    return model


def _payload_bytes(row: Row) -> int:
    numel = 1
    for width in row.shape:
        numel *= width
    if row.bits in FLOATS:
        return numel * FLOATS[row.bits][0].itemsize
    return numel + row.shape[0] * FLOATS[16][0].itemsize


def _integer_rows(table: Sequence[Row]) -> list[Row]:
    """Integer tensors with the same part of every layer side by side: alike as they are, they
    share the coder's tables (0.1 % smaller on a trained pr414 than in table order)."""
    part = {row.name: [p for p in row.name.split(".") if not p.isdigit()] for row in table}
    return sorted((row for row in table if row.bits in INTEGER_BITS), key=lambda r: part[r.name])


def _pack(table: Sequence[Row], tensors: Mapping[str, Stored]) -> bytes:
    """Lay out the payload: all integers, all scales, then float16 and float32 tensors."""
    ordered = [tensors[row.name] for row in _integer_rows(table)]
    integers = [stored for stored in ordered if isinstance(stored, Quantized)]
    # By columns: 0.6 to 1.5 % smaller than by rows on a trained pr414, whose columns differ in
    # size while the scales have made its rows alike.
    sections = [stored.q.T.contiguous().numpy().tobytes() for stored in integers]
    sections.append(_to_planes([stored.scale for stored in integers], 16))
    for bits in FLOATS:
        floats = [_tensor(tensors[row.name]) for row in table if row.bits == bits]
        sections.append(_to_planes(floats, bits))
    return b"".join(sections)


def _unpack(payload: memoryview, table: Sequence[Row], where: str) -> dict[str, Stored]:
    """Take the payload apart; its length was checked against the table."""
    stored: dict[str, Stored] = {}
    integers: dict[str, Tensor] = {}
    for row in _integer_rows(table):
        rows, cols = row.shape
        columns = np.frombuffer(payload[: rows * cols], np.int8).reshape(cols, rows)
        if columns.max() > levels(row.bits) or columns.min() < -levels(row.bits) - 1:
            raise DataError(f"{where}: tensor {row.name!r} leaves its {row.bits}-bit grid; {_FIX}")
        integers[row.name] = torch.from_numpy(np.array(columns.T, order="C"))
        payload = payload[rows * cols :]
    scales, payload = _from_planes(payload, [(r, r.shape[:1]) for r in _integer_rows(table)], 16)
    for row in _integer_rows(table):
        scale = scales[row.name]
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise DataError(
                f"{where}: tensor {row.name!r} has a scale that is not positive; {_FIX}"
            )
        stored[row.name] = Quantized(integers[row.name], scale, row.bits)
    for bits in FLOATS:
        shapes = [(row, row.shape) for row in table if row.bits == bits]
        floats, payload = _from_planes(payload, shapes, bits)
        for name, tensor in floats.items():
            if not bool(torch.isfinite(tensor).all()):
                raise DataError(f"{where}: tensor {name!r} is not finite; {_FIX}")
            stored[name] = Floats(tensor)
    return stored


def _to_planes(tensors: Sequence[Tensor], bits: int) -> bytes:
    """Little-endian floats, all first bytes together, then all second ones, and so on: sign and
    exponent repeat, low bits do not."""
    dtype, _ = FLOATS[bits]
    flat = [tensor.contiguous().view(-1).numpy().astype(dtype) for tensor in tensors]
    data = np.frombuffer(b"".join(part.tobytes() for part in flat), np.uint8)
    return data.reshape(-1, dtype.itemsize).T.tobytes()


def _from_planes(
    payload: memoryview, shapes: Sequence[tuple[Row, tuple[int, ...]]], bits: int
) -> tuple[dict[str, Tensor], memoryview]:
    """Undo `_to_planes`; return tensors by name and the rest of the payload."""
    dtype, native = FLOATS[bits]
    counts = [int(np.prod(shape, dtype=np.int64)) for _, shape in shapes]
    num_bytes = sum(counts) * dtype.itemsize
    planes = np.frombuffer(payload[:num_bytes], np.uint8).reshape(dtype.itemsize, -1)
    flat = np.ascontiguousarray(planes.T).view(dtype).reshape(-1)
    whole = torch.from_numpy(flat.astype(dtype.newbyteorder("="))).to(native)
    parts = whole.split(counts) if counts else ()
    named = zip(shapes, parts, strict=True)
    return {row.name: part.reshape(shape) for (row, shape), part in named}, payload[num_bytes:]


def _tensor(stored: Stored) -> Tensor:
    return stored.q if isinstance(stored, Quantized) else stored.tensor


def _bits(stored: Stored) -> int:
    return stored.bits if isinstance(stored, Quantized) else 8 * stored.tensor.element_size()
