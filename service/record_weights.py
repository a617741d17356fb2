"""What a record's weights file says of itself: its header alone, decoded no further. No torch.

The file is somebody else's. Its whole form is judged where it is scored, in the clean room; here
only what a sheet claims is held against it, before anything is made by the sheet's words.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Final

from service.record import Entry, sheet_name, weights_name
from service.record_text import Mismatch, shown
from trainer.codec import canonical, dump, flatten
from trainer.errors import DataError, UsageError
from trainer.finalize.compress import peek
from trainer.protocol import UNKNOWN_TOKENIZER
from trainer.specs.model import ModelSpec

# As docs/artifact-format.md has them: magic, version, compressor, frame, content, checksum.
_PREFIX: Final = struct.Struct("<4sBBIII")
_LENGTH: Final = struct.Struct("<I")
_KINDS: Final = ("zstd", "brotli", "lzma", "zlib", "range")
_BESIDE_RANGE: Final = "brotli"  # what packs the header where integers are coded apart
_MAX_HEADER_BYTES: Final = 1 << 20
_MAX_VISITS: Final = 1 << 16  # of layers that are run several times


@dataclass(frozen=True, slots=True)
class Header:
    """The claims of a weights file's header. model: plain data, as a spec is dumped."""

    model: dict[str, Any]
    num_tensors: int
    num_params: int
    tokenizer_sha256: str
    compress: str


def header_of(content: bytes, where: str) -> Header:
    """Read the header of a weights file; DataError names `where`."""
    if len(content) < _PREFIX.size:
        raise DataError(f"{where}: not a weights file")
    magic, _, kind, length, _, _ = _PREFIX.unpack_from(content)
    if magic != b"FWTS" or kind >= len(_KINDS):
        raise DataError(f"{where}: not a weights file")
    frame = memoryview(content)[_PREFIX.size :][:length]
    packed = _BESIDE_RANGE if _KINDS[kind] == "range" else _KINDS[kind]
    head = peek(frame, packed, _LENGTH.size, where)
    size = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else 0
    if not 0 < size <= _MAX_HEADER_BYTES:
        raise DataError(f"{where}: a header of {size} bytes")
    text = bytes(peek(frame, packed, _LENGTH.size + size, where)[_LENGTH.size :])
    try:
        claims = json.loads(text)
        shapes = [[int(n) for n in row[1]] for row in claims["tensors"]]
        model, tokenizer = dict(claims["model"]), str(claims["tokenizer_sha256"])
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, OverflowError) as error:
        raise DataError(f"{where}: the header does not say its model and tensors") from error
    return Header(model, len(shapes), sum(map(prod, shapes)), tokenizer, _KINDS[kind])


def fits_weights(entry: Entry, content: bytes) -> bool:
    """Whether the sheet's model is the weights' own, and no larger than their tensors: of another
    one nothing is made, for it could be of any size."""
    try:
        header = header_of(content, "weights")
    except UsageError:
        return False
    model = entry.sheet.train_task.model
    return canonical(header.model) == canonical(model.exported()) and not _is_large(model, header)


def _is_large(model: ModelSpec, header: Header) -> bool:
    again = model.recurrence
    visits = 0 if again is None else again.passes * (again.last - again.first + 1)
    return model.num_layers > header.num_tensors or visits > _MAX_VISITS


def header_mismatches(entry: Entry, content: bytes) -> Iterator[Mismatch]:
    """What the sheet says of the model, its size, its tokenizer and its compressor, held against
    the weights' header."""
    sheet, name, weights = entry.sheet, sheet_name(entry.seed), weights_name(entry.seed)
    try:
        header = header_of(content, weights)
    except UsageError as error:
        reason = str(error).removeprefix(f"{weights}: ")
        yield Mismatch(weights, "header", "readable", shown(reason))
        return
    said, found = flatten(dump(sheet.train_task.model.exported())), flatten(header.model)
    for path in sorted(said.keys() | found.keys()):
        claim, own = said.get(path), found.get(path)
        if canonical([claim]) != canonical([own]):
            yield Mismatch(
                name, f"train_task.model.{path}", shown(claim), f"{shown(own)} in {weights}"
            )
    if _is_large(sheet.train_task.model, header):
        field, own = "train_task.model", f"{header.num_tensors} tensors in {weights}"
        yield Mismatch(name, field, "a model of its tensors", own)
    pairs = [
        ("result.num_params", sheet.result.num_params, header.num_params),
        ("final_task.final.compress.kind", sheet.final_task.final.compress.kind, header.compress),
    ]
    if header.tokenizer_sha256 != UNKNOWN_TOKENIZER:
        pairs.append(
            ("data.tokenizer_sha256", sheet.data.tokenizer_sha256, header.tokenizer_sha256)
        )
    for field, claim, own in pairs:
        if claim != own:
            yield Mismatch(name, field, shown(claim), f"{shown(own)} in {weights}")
