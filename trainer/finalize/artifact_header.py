"""The header of a weights file: what it says of itself, and the checks that it must pass.

Nothing is allocated by the numbers of a header before they were found plausible.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from trainer.blueprint import blueprint
from trainer.codec import canonical, dump, parse
from trainer.errors import DataError, UsageError
from trainer.sizes import tensor_sizes
from trainer.specs.final import MAX_RANK
from trainer.specs.model import ModelSpec

MAX_WIDTH: Final = 2**24  # of any one dimension; keeps a claimed spec's arithmetic small
MAX_VISITS: Final = 2**16  # of layers that are run several times
MAX_NAME: Final = 200
INTEGER_BITS: Final = range(2, 9)
FLOATS: Final = {16: (np.dtype("<f2"), torch.float16), 32: (np.dtype("<f4"), torch.float32)}

_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIX = "finalize the model again"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the tensor table. bits 2..8: integers with row scales, and a low-rank repair
    where rank is above 0; 16, 32: floats."""

    name: str
    shape: tuple[int, ...]
    bits: int
    rank: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class WeightsHeader:
    """What a weights file says about itself; `content_bytes` is what all of it decodes to."""

    version: int
    compress: str
    tokenizer_sha256: str
    content_bytes: int
    table: tuple[Row, ...]


def header_bytes(model: ModelSpec, table: Sequence[Row], tokenizer_sha256: str) -> bytes:
    """Write a header, as `parse_header` reads it."""
    rows = [[r.name, r.shape, r.bits, *([r.rank] if r.rank else [])] for r in table]
    claims = {"model": dump(model), "tensors": rows, "tokenizer_sha256": tokenizer_sha256}
    return canonical(claims).encode()


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


def parse_header(header: bytes, where: str) -> tuple[ModelSpec, tuple[Row, ...], str]:
    """Check everything that a header claims; return its model, table and tokenizer."""
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
            case [str(name), [*shape], int(bits), *rank] if (
                len(name) <= MAX_NAME
                and len(rank) < 2
                and all(type(n) is int and 0 < n <= MAX_WIDTH for n in (*shape, bits, *rank))
            ):
                row = Row(name, tuple(shape), bits, *rank)
            case _:
                raise DataError(f"{where}: a tensor is not [name, shape, bits, rank?]; {_FIX}")
        if name in rows:
            raise DataError(f"{where}: tensor {name!r} is given twice; {_FIX}")
        is_matrix = bits in INTEGER_BITS and len(shape) == 2
        if not (is_matrix or bits in FLOATS):
            raise DataError(f"{where}: tensor {name!r} with {bits} bits per entry; {_FIX}")
        if row.rank > (min(*shape, MAX_RANK) if is_matrix else 0):
            raise DataError(f"{where}: tensor {name!r} with a repair of rank {row.rank}; {_FIX}")
        rows[name] = row
    return tuple(rows.values())


def _parse_model(claims: Any, num_tensors: int, where: str) -> ModelSpec:
    try:
        model = parse(ModelSpec, claims, "model")
    except (UsageError, RecursionError, OverflowError) as error:
        reason = "".join(str(error).splitlines()[:1])[:200]
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
