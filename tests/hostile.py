"""Weights files as an attacker would write them, and a process that reads them under guard."""

import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.forged import QUICK, Parts, put_together, take_apart
from trainer.errors import DataError
from trainer.finalize.artifact import HEADER_LENGTH, PREFIX, read_weights

EACH = 200  # files of each kind
BOMB_BYTES = 1 << 25
EXTREMES = (0, 1, 3, 2**8, 2**15, 2**16 - 1, 2**20, 2**24, 2**30, 2**31, 2**32 - 1)
WIDTHS = (0, -1, 1, 2**10, 2**16, 2**24, 2**24 + 1, 2**31, 2**63, 10**400, 0.5, True, "8", None)

# Name, bytes, and whether the file is sound: then it may be read as something else.
Mutant = tuple[str, bytes, bool]


def mutants(kind: str, folder: Path) -> Iterator[Mutant]:
    """Yield EACH files made of the good one of this kind."""
    draw = random.Random(kind)
    good = (folder / f"{kind}.fw").read_bytes()
    plain = take_apart(folder / "zstd.fw")
    parts = take_apart(folder / f"{kind}.fw")
    if kind == "range":
        parts = replace(parts, columns=_columns(parts, plain))
    scratch = folder / "forged.fw"
    bombs = list(_bombs(parts, scratch))
    yield from bombs
    for index in range(EACH - len(bombs)):
        make = _MAKERS[index % len(_MAKERS)]
        made = make(draw, good, parts, scratch)
        yield f"{kind} {index} {make.__name__}", made, make in _SOUND


def _columns(parts: Parts, plain: Parts) -> bytes:
    """The integers behind the frame: what a plain file has at the end of its content."""
    lengths = 4 * sum(row[2] <= 8 for row in json.loads(parts.header)["tensors"])
    return plain.payload[len(parts.payload) - lengths :]


def _flip(draw: random.Random, good: bytes, *_: Any) -> bytes:
    data = bytearray(good)
    # Half of them where the structure is.
    reach = draw.choice((64, 8 * len(data)))
    for _ in range(draw.choice((1, 1, 2, 50))):
        bit = draw.randrange(min(reach * 8, 8 * len(data)))
        data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


def _overwrite(draw: random.Random, good: bytes, *_: Any) -> bytes:
    at, size = draw.randrange(len(good)), draw.choice((1, 4, 100, 5000))
    filler = draw.choice((draw.randbytes(size), bytes(size), b"\xff" * size))
    return (good[:at] + filler + good[at + size :])[: len(good)]


def _truncate(draw: random.Random, good: bytes, *_: Any) -> bytes:
    return good[: draw.randrange(len(good))]


def _insert(draw: random.Random, good: bytes, *_: Any) -> bytes:
    at = draw.choice((draw.randrange(len(good)), draw.randrange(40), len(good)))
    return good[:at] + draw.randbytes(draw.choice((1, 2, 4, 1000))) + good[at:]


def _shuffle(draw: random.Random, good: bytes, *_: Any) -> bytes:
    """Cut into four and put together in another order, or with one left out or doubled."""
    cuts = sorted(draw.randrange(len(good)) for _ in range(3))
    pieces = [good[a:b] for a, b in zip([0, *cuts], [*cuts, len(good)], strict=True)]
    return pieces[0] + b"".join(draw.choices(pieces[1:], k=draw.randrange(5)))


def _claim(draw: random.Random, good: bytes, parts: Parts, scratch: Path) -> bytes:
    """Lie in the prefix."""
    field = draw.choice(("version", "kind", "frame_bytes", "content_bytes", "checksum"))
    value = draw.choice(EXTREMES)
    claim = value % 256 if field in ("version", "kind") else value
    return put_together(scratch, parts, **{field: claim}).read_bytes()


def _header(draw: random.Random, good: bytes, parts: Parts, scratch: Path) -> bytes:
    """Lie in the header, with lengths and checksum that agree."""
    claims = json.loads(parts.header)
    rows, model = claims["tensors"], claims["model"]
    row = draw.choice(rows)
    match draw.randrange(7):
        case 0:
            row[1][draw.randrange(len(row[1]))] = draw.choice(WIDTHS)
        case 1:
            row[2] = draw.choice((0, 1, 2, 5, 8, 9, 16, 32, 64, True, -6, 10**400))
        case 2:
            row.append(draw.choice((0, 1, 2, 8, 2**24, -1, 10**20)))
        case 3:
            rows.insert(draw.randrange(len(rows)), draw.choice(rows))
        case 4:
            rows.remove(row)
        case 5:
            name = draw.choice(("vocab_size", "dim", "num_layers"))
            model[name] = draw.choice(WIDTHS)
            for other in rows:
                # The table agrees, so only the length of the content is left to tell.
                other[1] = [model[name] if width == 64 else width for width in other[1]]
        case 6:
            model["recurrence"] = {"first": 0, "last": 1, "passes": draw.choice(WIDTHS)}
    text = json.dumps(claims, sort_keys=True, separators=(",", ":")).encode()
    return put_together(scratch, replace(parts, header=text)).read_bytes()


def _json(draw: random.Random, good: bytes, parts: Parts, scratch: Path) -> bytes:
    """A header that is another text."""
    at = draw.randrange(len(parts.header))
    size = draw.choice((0, 1, 30))
    filler = draw.choice((b"[" * 60_000, b"9" * 5_000, b"{}", b'"', b"null", b"\xff", b"\n"))
    text = parts.header[:at] + filler + parts.header[at + size :]
    return put_together(scratch, replace(parts, header=text)).read_bytes()


def _length(draw: random.Random, good: bytes, parts: Parts, scratch: Path) -> bytes:
    """A header longer or shorter than it says."""
    length = draw.choice((*EXTREMES, len(parts.header) - 1, len(parts.header) + 1))
    content = HEADER_LENGTH.pack(length) + parts.content[HEADER_LENGTH.size :]
    return put_together(scratch, parts, content).read_bytes()


def _payload(draw: random.Random, good: bytes, parts: Parts, scratch: Path) -> bytes:
    """Other scales, integers or floats behind a true header."""
    payload = _overwrite(draw, parts.payload)
    return put_together(scratch, replace(parts, payload=payload)).read_bytes()


def _resized(draw: random.Random, good: bytes, parts: Parts, scratch: Path) -> bytes:
    """More or less behind a true header."""
    payload = draw.choice((_truncate, _insert))(draw, parts.payload)
    claims = draw.choice(({}, {"content_bytes": len(parts.content)}))
    return put_together(scratch, replace(parts, payload=payload), **claims).read_bytes()


def _blobs(draw: random.Random, good: bytes, parts: Parts, scratch: Path) -> bytes:
    """Other bytes behind the frame."""
    change = draw.choice((_flip, _overwrite, _truncate, _insert, _shuffle))
    blobs = change(draw, parts.blobs or b"blob")
    return put_together(scratch, replace(parts, blobs=blobs)).read_bytes()


_SOUND = (_header, _payload)
_MAKERS: tuple[Callable[..., bytes], ...] = (
    _flip, _flip, _flip, _overwrite, _truncate, _insert, _shuffle, _claim, _header, _header,
    _header, _json, _length, _payload, _resized, _blobs,
)  # fmt: skip


def _bombs(parts: Parts, scratch: Path) -> Iterator[Mutant]:
    """Frames of few bytes that hold many."""
    zeros = bytes(BOMB_BYTES)
    content = parts.content
    long_header = HEADER_LENGTH.pack(BOMB_BYTES) + zeros
    for name, held in (("payload", content + zeros), ("header", long_header)):
        path = put_together(scratch, parts, held)
        data = path.read_bytes()
        yield f"{parts.kind} bomb of {name}", data, False
        for claim in (len(content), 2**30, 2**32 - 1):
            prefix = list(PREFIX.unpack_from(data))
            prefix[4] = claim
            lie = PREFIX.pack(*prefix) + data[PREFIX.size :]
            yield f"{parts.kind} bomb of {name} as {claim}", lie, False


def read(path: Path) -> dict[str, torch.Tensor] | str:
    """What a file is read as, or the line with which it is refused."""
    try:
        return read_weights(path)[1]
    except DataError as error:
        return str(error)


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def fault(outcome: dict[str, torch.Tensor] | str, path: Path, expected: Any, is_sound: bool) -> str:
    """What is wrong with an outcome; nothing for a refusal in one line or the honest tensors."""
    if isinstance(outcome, str):
        is_line = outcome.startswith(f"{path}: ") and len(outcome.splitlines()) == 1
        return "" if is_line and len(outcome) < 1000 else f"refused with {outcome[:200]!r}"
    if is_sound:
        is_finite = all(bool(torch.isfinite(tensor).all()) for tensor in outcome.values())
        return "" if is_finite else "not finite"
    same = outcome.keys() == expected.keys()
    return "" if same and all(torch.equal(outcome[n], expected[n]) for n in outcome) else "differs"


def write_mutants(folder: Path) -> int:
    """Make the mutants of the good files in `folder`, in a process whose memory nobody measures."""
    index = []
    for kind in QUICK:
        for name, data, is_sound in mutants(kind, folder):
            (folder / f"{len(index)}.mutant").write_bytes(data)
            index.append((name, kind, is_sound))
    (folder / "index.json").write_text(json.dumps(index))
    return len(index)


def apart(work: Callable[[], Any]) -> Any:
    """Run something in a fork, whose peak of memory starts at what it inherits; return its JSON."""
    receive, send = os.pipe()
    if os.fork() == 0:
        with os.fdopen(send, "w") as pipe:
            json.dump(work(), pipe)
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        result = json.load(pipe)
    os.wait()
    return result


def read_mutants(folder: Path) -> dict[str, Any]:
    """Read every mutant; return what went wrong, and the most time and memory that one took."""
    honest = {kind: read_weights(folder / f"{kind}.fw")[1] for kind in QUICK}
    base = peak_bytes()
    report: dict[str, Any] = {"refused": 0, "faults": [], "seconds": 0.0}
    index = json.loads((folder / "index.json").read_text())
    for number, (name, kind, is_sound) in enumerate(index):
        sys.stderr.write(f"{name}\n")
        path = folder / f"{number}.mutant"
        started = time.process_time()
        outcome = read(path)
        report["seconds"] = max(report["seconds"], time.process_time() - started)
        report["refused"] += isinstance(outcome, str)
        if problem := fault(outcome, path, honest[kind], is_sound):
            report["faults"].append(f"{name}: {problem}")
    return report | {"bytes": peak_bytes() - base}


def read_large(path: Path, good: Path) -> tuple[int, int]:
    """Read a large file after a good one; return the memory that it took and its tensors' size."""
    read_weights(good)
    base = peak_bytes()
    tensors = read_weights(path)[1]
    return peak_bytes() - base, 4 * sum(tensor.numel() for tensor in tensors.values())


def main(folder: Path) -> None:
    """Read every mutant and every large file in `folder`; print what that took as JSON."""
    torch.set_num_threads(1)
    report = apart(lambda: read_mutants(folder))
    good = folder / "zstd.fw"
    large = {p.name: apart(lambda p=p: read_large(p, good)) for p in folder.glob("*.big")}
    sys.stdout.write(json.dumps(report | {"large": large}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
