"""Our own coder for quantized matrices: every integer by the scale of its row and of its column.

Trained weights are Gaussian to 0.01 % of their code length once the scale of the row times that
of the column is taken out (measured on pr414). So a matrix is written as its scales, rounded to
what its integers can tell, and one run of integers for each class of like scale. Scales follow
those of an earlier matrix where that is shorter: an MLP's unit is large or small in both of its
matrices. Where they show, as in an embedding whose rare tokens are all alike, a few products of a
column and a row are taken out of the means and of the scales first. Probabilities are integers
(`coder_tables`), the coder is constriction's ANS.

A blob is one ANS stream: low, high; base, tails; rows; columns; shifts; means; the integers, class
by class. Which references there are is known from the matrices before, so all are decoded in one
call. Slow and plain, with no library: tests/reference/coder_reference.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from trainer.errors import DataError
from trainer.finalize.coder_fit import plans
from trainer.finalize.coder_plan import (
    CODE_SHAPE,
    EXPONENTS,
    MAX_CODE,
    MAX_MEAN,
    MAX_RANK,
    NUM_SPREADS,
    SLOPES,
    Axis,
    Codes,
    Component,
    Earlier,
    Plan,
    classes_of,
    means_of,
    remember,
    scales_of,
)
from trainer.finalize.coder_tables import NUM_CLASSES, NUM_SHAPES, STREAM, models
from trainer.quant import levels

BLOCK: Final = 2**20  # integers that are sorted at a time, which bounds a reader's memory
_WORD: Final = 4
_ANS: Final = STREAM.stack.AnsCoder
_UNIFORM: Final = STREAM.model.Uniform


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """What the reader knows of a matrix before it decodes it; scale float16 [rows]."""

    name: str
    rows: int
    cols: int
    bits: int
    scale: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Integers:
    """One quantized matrix: q int8 [rows, cols] in -R-1..R, scale float16 [rows]."""

    name: str
    q: np.ndarray
    bits: int
    scale: np.ndarray


def encode(matrices: Sequence[Integers]) -> list[bytes]:
    """Return one blob per matrix; equal matrices in equal order give equal blobs."""
    earlier: Earlier = {}
    return [_encode(matrix, earlier) for matrix in matrices]


def decode(blobs: Sequence[bytes], shapes: Sequence[Shape], where: str) -> list[np.ndarray]:
    """Return q of every matrix, int8 [rows, cols] within its grid.

    DataError, starting with `where`, for a blob that `encode` cannot have written. One of the
    right form gives integers, right or wrong, so the file needs a checksum of its own.
    """
    earlier: Earlier = {}
    return [_decode(blob, shape, earlier, where) for blob, shape in zip(blobs, shapes, strict=True)]


class _Sink:
    """Collects values in the order of reading; ANS is a stack, so they are coded backwards."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, Any]] = []

    def number(self, value: int, count: int) -> None:
        if count > 1:
            self.run(np.array([value]), _UNIFORM(count))

    def run(self, values: np.ndarray, model: Any) -> None:
        self._parts.append((values.astype(np.int32), model))

    def blob(self) -> bytes:
        coder = _ANS()
        for values, model in reversed(self._parts):
            coder.encode_reverse(values, model)
        return coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")


class _Source:
    """Takes values from a blob; there is no blob that has none."""

    def __init__(self, blob: bytes) -> None:
        words = np.frombuffer(blob + bytes(-len(blob) % _WORD), "<u4")
        self._coder = _ANS(words.astype(np.uint32))

    def number(self, count: int) -> int:
        return int(self._coder.decode(_UNIFORM(count))) if count > 1 else 0

    def run(self, model: Any, length: int) -> np.ndarray:
        return self._coder.decode(model, length)

    def is_empty(self) -> bool:
        return self._coder.is_empty()


def _encode(matrix: Integers, earlier: Earlier) -> bytes:
    if matrix.q.min() == matrix.q.max():
        return _write(matrix, None, earlier)
    written = [
        (_write(matrix, plan, earlier), plan) for plan in plans(matrix.q, matrix.scale, earlier)
    ]
    blob, plan = min(written, key=lambda one: len(one[0]))
    remember(plan, matrix.scale, earlier)
    return blob


def _write(matrix: Integers, plan: Plan | None, earlier: Earlier) -> bytes:
    """Return the blob under a model, or without one where all integers are the same."""
    sink = _Sink()
    low, high = int(matrix.q.min()), int(matrix.q.max())
    for end in (low, high):
        sink.number(end + levels(matrix.bits) + 1, 2**matrix.bits)
    if plan is not None:
        sink.number(plan.base, NUM_CLASSES)
        sink.number(plan.shape, NUM_SHAPES)
        for axis in (plan.rows, plan.cols):
            _put_axis(sink, axis, earlier)
        for components in (plan.shifts, plan.means):
            _put_components(sink, components)
        symbols = matrix.q.reshape(-1).astype(np.int32) - low
        for places, model in _runs(plan, (low, high), matrix.scale, earlier):
            sink.run(symbols[places], model)
    return sink.blob()


def _decode(blob: bytes, shape: Shape, earlier: Earlier, where: str) -> np.ndarray:
    broken = DataError(f"{where}: tensor {shape.name!r} is damaged; finalize the model again")
    if blob.endswith(b"\0"):
        raise broken
    source = _Source(blob)
    low, high = (source.number(2**shape.bits) - levels(shape.bits) - 1 for _ in range(2))
    if low > high:
        raise broken
    q = np.full(shape.rows * shape.cols, low, np.int8)
    if low < high:
        plan = _take_plan(source, shape, earlier)
        for places, model in _runs(plan, (low, high), shape.scale, earlier):
            q[places] = source.run(model, len(places)) + low
        remember(plan, shape.scale, earlier)
    if not source.is_empty():
        raise broken
    return q.reshape(shape.rows, shape.cols)


def _take_plan(source: _Source, shape: Shape, earlier: Earlier) -> Plan:
    base, tails = source.number(NUM_CLASSES), source.number(NUM_SHAPES)
    rows, cols = (_take_axis(source, length, earlier) for length in (shape.rows, shape.cols))
    shifts, means = (_take_components(source, shape.rows, shape.cols) for _ in range(2))
    return Plan(base, tails, rows, cols, shifts, means)


def _put_axis(sink: _Sink, axis: Axis, earlier: Earlier) -> None:
    sink.number(axis.reference, len(earlier.get(len(axis.codes.values), ())) + 1)
    if axis.reference:
        sink.number(axis.slope - 1, SLOPES)
    _put_codes(sink, axis.codes)


def _take_axis(source: _Source, length: int, earlier: Earlier) -> Axis:
    reference = source.number(len(earlier.get(length, ())) + 1)
    slope = source.number(SLOPES) + 1 if reference else 0
    return Axis(reference, slope, _take_codes(source, length))


def _put_components(sink: _Sink, components: Sequence[Component]) -> None:
    sink.number(len(components), MAX_RANK + 1)
    for part in components:
        sink.number(part.exponent, EXPONENTS)
        _put_codes(sink, part.rows)
        _put_codes(sink, part.cols)


def _take_components(source: _Source, rows: int, cols: int) -> tuple[Component, ...]:
    return tuple(
        Component(source.number(EXPONENTS), _take_codes(source, rows), _take_codes(source, cols))
        for _ in range(source.number(MAX_RANK + 1))
    )


def _put_codes(sink: _Sink, codes: Codes) -> None:
    sink.number(codes.spread, NUM_SPREADS)
    if codes.spread:
        sink.run(codes.values + MAX_CODE, _code_table(codes.spread))


def _take_codes(source: _Source, length: int) -> Codes:
    spread = source.number(NUM_SPREADS)
    if spread == 0:
        return Codes(0, np.zeros(length, np.int32))
    return Codes(spread, source.run(_code_table(spread), length) - MAX_CODE)


def _code_table(spread: int) -> Any:
    half, zero = np.array([2 * (spread - 1)]), np.zeros(1, np.int64)
    return next(models(half, zero, CODE_SHAPE, -MAX_CODE, MAX_CODE))


def _runs(
    plan: Plan, ends: tuple[int, int], scale: np.ndarray, earlier: Earlier
) -> Iterator[tuple[np.ndarray, Any]]:
    """Yield the flat places of the integers that share class and mean, and their model, block by
    block of rows."""
    rows, cols = scales_of(plan, scale, earlier)
    height = max(1, BLOCK // len(cols))
    for top in range(0, len(rows), height):
        part = slice(top, top + height)
        kinds = classes_of(plan, rows, cols, part)
        kinds += (means_of(plan, part) + MAX_MEAN).astype(np.uint16) << 8
        flat = kinds.reshape(-1)
        order = np.argsort(flat, kind="stable")
        counts = np.bincount(flat)
        used = np.flatnonzero(counts)
        runs = np.split(top * len(cols) + order, np.cumsum(counts[used])[:-1])
        yield from zip(
            runs, models(used & 255, (used >> 8) - MAX_MEAN, plan.shape, *ends), strict=True
        )
