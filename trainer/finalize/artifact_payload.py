"""How tensors lie in the content of a weights file: sections, byte planes, packed repairs.

Before anything is unpacked, `artifact` has checked the header and the length of the content.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from torch import Tensor

from trainer.errors import DataError
from trainer.finalize.artifact_header import FLOATS, INTEGER_BITS, Row
from trainer.finalize.stored import LOW_RANK_GROUP, LowRank, Quantized, Stored
from trainer.quant import levels

LENGTH_BYTES: Final = 4
A_BITS: Final = 2
B_BITS: Final = 4
_FIX = "finalize the model again"

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """What a file holds beside its integers, by name of tensor."""

    scales: dict[str, Tensor] = field(default_factory=dict)
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    floats: dict[str, Tensor] = field(default_factory=dict)


def integer_rows(table: Sequence[Row]) -> list[Row]:
    """Integer tensors with the same part of every layer side by side: alike as they are, they
    share the coder's statistics (0.1 % smaller on a trained pr414 than in table order)."""
    part = {row.name: [p for p in row.name.split(".") if not p.isdigit()] for row in table}
    return sorted((row for row in table if row.bits in INTEGER_BITS), key=lambda r: part[r.name])


def by_columns(q: np.ndarray) -> bytes:
    """Lay out a matrix by columns: 0.6 to 1.5 % smaller than by rows on a trained pr414, whose
    columns differ in size while the scales have made its rows alike."""
    return q.T.tobytes()


def from_columns(data: memoryview, rows: Sequence[Row]) -> Iterator[np.ndarray]:
    """Undo `by_columns` for one matrix after the other."""
    for row in rows:
        height, width = row.shape
        columns = np.frombuffer(data[: row.numel], np.int8).reshape(width, height)
        yield np.array(columns.T, order="C")
        data = data[row.numel :]


def pack_lengths(blobs: Sequence[bytes]) -> bytes:
    """Lay out the lengths of coded matrices, in byte planes."""
    return np.array([[len(blob)] for blob in blobs], "<u4").view(np.uint8).T.tobytes()


def unpack_lengths(data: memoryview, count: int) -> list[int]:
    """Undo `pack_lengths`."""
    planes = np.frombuffer(data[: LENGTH_BYTES * count], np.uint8).reshape(LENGTH_BYTES, count)
    return np.ascontiguousarray(planes.T).view("<u4").reshape(-1).tolist()


def check_integers(q: np.ndarray, row: Row, where: str) -> None:
    """Raise DataError where an integer leaves -R-1..R."""
    if q.max() > levels(row.bits) or q.min() < -levels(row.bits) - 1:
        raise DataError(f"{where}: tensor {row.name!r} leaves its {row.bits}-bit grid; {_FIX}")


def side_of(tensors: Mapping[str, Stored]) -> Side:
    """Take from stored tensors all but the integers."""
    side = Side()
    for name, stored in tensors.items():
        if not isinstance(stored, Quantized):
            side.floats[name] = stored.tensor
            continue
        side.scales[name] = stored.scale
        if stored.low_rank is not None:
            side.low_rank[name] = stored.low_rank
    return side


def check_side(side: Side, where: str) -> None:
    """Raise DataError where a number is not finite, or a scale not above zero."""
    for name, scale in side.scales.items():
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise DataError(f"{where}: tensor {name!r} has a scale that is not positive; {_FIX}")
    floats = [(name, part.a_scale) for name, part in side.low_rank.items()]
    floats += [(name, part.b_scale) for name, part in side.low_rank.items()]
    for name, tensor in (*floats, *side.floats.items()):
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{where}: tensor {name!r} is not finite; {_FIX}")


def side_bytes(table: Sequence[Row]) -> int:
    """The length of what `pack_side` makes."""
    total = 0
    for row in table:
        if row.bits in FLOATS:
            total += row.numel * FLOATS[row.bits][0].itemsize
            continue
        shapes = [row.shape[:1], *(_repair_scales(row) if row.rank else ())]
        total += 2 * sum(math.prod(shape) for shape in shapes)
        if row.rank:
            total += _packed_bytes(_a_shape(row), A_BITS) + _packed_bytes(_b_shape(row), B_BITS)
    return total


def pack_side(table: Sequence[Row], side: Side) -> bytes:
    """Lay out a side: scales, repairs, float16 and float32 tensors."""
    rows = integer_rows(table)
    repairs = [side.low_rank[row.name] for row in rows if row.rank]
    scales = [side.scales[row.name] for row in rows]
    scales += [scale for part in repairs for scale in (part.a_scale, part.b_scale)]
    sections = [_to_planes(scales, 16)]
    for part in repairs:
        sections += [_pack(part.a, A_BITS), _pack(part.b, B_BITS)]
    for bits in FLOATS:
        sections.append(_to_planes([side.floats[r.name] for r in table if r.bits == bits], bits))
    return b"".join(sections)


def unpack_side(payload: memoryview, table: Sequence[Row]) -> Side:
    """Undo `pack_side`."""
    rows, side = integer_rows(table), Side()
    repaired = [row for row in rows if row.rank]
    shapes = [row.shape[:1] for row in rows]
    shapes += [shape for row in repaired for shape in _repair_scales(row)]
    tensors, payload = _from_planes(payload, shapes, 16)
    scales = iter(tensors)
    side.scales.update((row.name, next(scales)) for row in rows)
    for row in repaired:
        a, payload = _unpack(payload, _a_shape(row), A_BITS)
        b, payload = _unpack(payload, _b_shape(row), B_BITS)
        side.low_rank[row.name] = LowRank(a, next(scales), b, next(scales))
    for bits in FLOATS:
        held = [row for row in table if row.bits == bits]
        tensors, payload = _from_planes(payload, [row.shape for row in held], bits)
        side.floats.update(zip((row.name for row in held), tensors, strict=True))
    return side


def _a_shape(row: Row) -> Shape:
    return row.shape[0], row.rank


def _b_shape(row: Row) -> Shape:
    return row.rank, row.shape[1]


def _repair_scales(row: Row) -> tuple[Shape, Shape]:
    return (), (row.rank, -(-row.shape[1] // LOW_RANK_GROUP))


def _packed_bytes(shape: Shape, bits: int) -> int:
    return -(-math.prod(shape) * bits // 8)


def _pack(q: Tensor, bits: int) -> bytes:
    """Small integers, by rows, each plus 2 ** (bits - 1), lowest bits of a byte first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    raised = (q.numpy().reshape(-1) + 2 ** (bits - 1)).astype(np.uint8)
    whole = np.pad(raised, (0, -raised.size % shifts.size)).reshape(-1, shifts.size)
    return (whole << shifts).sum(axis=1, dtype=np.uint8).tobytes()


def _unpack(payload: memoryview, shape: Shape, bits: int) -> tuple[Tensor, memoryview]:
    """Undo `_pack`; return the tensor and the rest of the payload."""
    num_bytes = _packed_bytes(shape, bits)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    raised = np.frombuffer(payload[:num_bytes], np.uint8)[:, None] >> shifts & (2**bits - 1)
    q = raised.reshape(-1)[: math.prod(shape)].astype(np.int8) - 2 ** (bits - 1)
    return torch.from_numpy(q.reshape(shape)), payload[num_bytes:]


def _to_planes(tensors: Sequence[Tensor], bits: int) -> bytes:
    """Little-endian floats, all first bytes together, then all second ones, and so on: sign and
    exponent repeat, low bits do not."""
    dtype, _ = FLOATS[bits]
    flat = [tensor.contiguous().view(-1).numpy().astype(dtype) for tensor in tensors]
    data = np.frombuffer(b"".join(part.tobytes() for part in flat), np.uint8)
    return data.reshape(-1, dtype.itemsize).T.tobytes()


def _from_planes(
    payload: memoryview, shapes: Sequence[Shape], bits: int
) -> tuple[list[Tensor], memoryview]:
    """Undo `_to_planes`; return the tensors and the rest of the payload."""
    dtype, native = FLOATS[bits]
    counts = [math.prod(shape) for shape in shapes]
    num_bytes = sum(counts) * dtype.itemsize
    planes = np.frombuffer(payload[:num_bytes], np.uint8).reshape(dtype.itemsize, -1)
    flat = np.ascontiguousarray(planes.T).view(dtype).reshape(-1)
    whole = torch.from_numpy(flat.astype(dtype.newbyteorder("="))).to(native)
    parts = whole.split(counts) if counts else ()
    tensors = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    return tensors, payload[num_bytes:]
