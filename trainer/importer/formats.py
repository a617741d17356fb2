"""The files that the public scripts write, told apart by their content and never executed.

Three forms, each as it is or in one xz, lzma, zstd or zlib stream, each a `torch.save`:
a state dict; `{"w": tensors, "m": meta}` of the mixed-integer scripts (#361, #414, #348, #951,
#610; techniques 2.22); and the baseline's `int8_clean_per_row_v1`.
"""

import hashlib
import io
import lzma
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from trainer.errors import DataError

MAX_BYTES: Final = 2**31  # of the file, and of what it unpacks to
MAX_MEMORY: Final = 2**31  # a decoder's own: long-distance windows are as large as the file
MAX_TENSORS: Final = 2000  # a hundred layers have half of them
MAX_NAME: Final = 200  # characters
BASELINE_FORMAT: Final = "int8_clean_per_row_v1"
_INTEGERS = re.compile(r"int([2-8])")
_PASSTHROUGH = ("passthrough", "passthrough_ctrl", "passthrough_fp16")
_FORMS = "a state dict, or a quantized file, of a public script"
_INSTEAD = "import the script's state dict instead"
_AGAIN = "copy the file again"
_WIDTHS = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
_FEED = 4096  # compressed bytes given at a time: one byte of zstd can stand for 32 KiB


@dataclass(frozen=True, slots=True, eq=False)
class Integers:
    """A tensor on a grid: q as stored, its scale per row or for the whole, its bits.

    With `is_packed`, q is uint8 and holds two columns a byte: q + 8, the even one in the high
    nibble, an odd width padded; `num_columns` is the width where the file tells it.
    """

    q: Tensor
    scale: Tensor
    bits: int
    is_packed: bool = False
    num_columns: int | None = None

    def shape_as(self, wanted: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape; of the two widths that a packed one may have, the wanted one."""
        shape = tuple(self.q.shape)
        if not self.is_packed:
            return shape
        width = 2 * shape[-1]
        if self.num_columns is not None:
            width = self.num_columns
        elif wanted and wanted[-1] == width - 1:
            width -= 1
        return (*shape[:-1], width)

    def unpacked(self, wanted: tuple[int, ...]) -> Tensor:
        """q as int8 in its `shape_as` the wanted one."""
        if not self.is_packed:
            return self.q
        nibbles = torch.stack((self.q >> 4, self.q & 15), dim=-1).flatten(-2)
        return nibbles[..., : self.shape_as(wanted)[-1]].to(torch.int8) - 8


@dataclass(frozen=True, slots=True, eq=False)
class PublicFile:
    """What a file holds: its form, its tensors by public name, the sha256 of its bytes."""

    form: str  # state dict | mixed integers | int8_clean_per_row_v1
    tensors: Mapping[str, Tensor | Integers]
    sha256: str

    @property
    def is_quantized(self) -> bool:
        return self.form != "state dict"


def read_public(path: Path) -> PublicFile:
    """Read a public script's file; DataError, starting with the path, for anything else."""
    raw = _read_bytes(path)
    content = _load(_unpacked(raw, str(path)), str(path))
    where = str(path)
    if set(content) == {"w", "m"}:
        form, tensors = "mixed integers", _mixed(content, where)
    elif "__quant_format__" in content:
        form, tensors = BASELINE_FORMAT, _baseline(content, where)
    else:
        form, tensors = "state dict", {n: _float(t, n, where) for n, t in content.items()}
    if not tensors:
        raise DataError(f"{where}: holds no tensor; give {_FORMS}")
    if len(tensors) > MAX_TENSORS:
        raise DataError(f"{where}: {len(tensors)} tensors exceed {MAX_TENSORS}; give {_FORMS}")
    return PublicFile(form, MappingProxyType(tensors), hashlib.sha256(raw).hexdigest())


def _read_bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if not path.is_file():  # a device or a pipe may never end
            raise DataError(f"{path}: not a regular file; give {_FORMS}")
        if size > MAX_BYTES:
            raise DataError(f"{path}: {size} bytes exceed {MAX_BYTES}; give {_FORMS}")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; give {_FORMS}") from error


def _unpacked(raw: bytes, where: str) -> bytes:
    """Undo the outer compression that the first bytes announce, up to MAX_BYTES."""
    found = next((n for n, starts in _COMPRESSORS.items() if raw.startswith(starts[0])), None)
    if found is None:
        return raw
    try:
        content = _COMPRESSORS[found][1](raw)
    except (lzma.LZMAError, zlib.error, EOFError, ValueError) as error:
        raise DataError(f"{where}: broken {found} stream ({error}); {_AGAIN}") from error
    if len(content) > MAX_BYTES:
        raise DataError(f"{where}: unpacks to more than {MAX_BYTES} bytes; give {_FORMS}")
    return content


def _unxz(raw: bytes) -> bytes:
    stream = lzma.LZMADecompressor(memlimit=MAX_MEMORY)
    content = stream.decompress(raw, MAX_BYTES + 1)
    return _whole(content, stream.eof, stream.unused_data)


def _inflate(raw: bytes) -> bytes:
    stream = zlib.decompressobj()
    content = stream.decompress(raw, MAX_BYTES + 1)
    return _whole(content, stream.eof, stream.unused_data)


def _unzstd(raw: bytes) -> bytes:
    import zstandard

    stream = zstandard.ZstdDecompressor(max_window_size=MAX_MEMORY).decompressobj()
    content, start = io.BytesIO(), 0
    try:
        while start < len(raw) and not stream.eof and content.tell() <= MAX_BYTES:
            content.write(stream.decompress(raw[start : start + _FEED]))
            start += _FEED
    except zstandard.ZstdError as error:
        raise ValueError(error) from error
    return _whole(content.getvalue(), stream.eof, stream.unused_data or raw[start:])


def _whole(content: bytes, is_whole: bool, unused: bytes) -> bytes:
    """What a stream held, if it came to its end and nothing follows; too much is told later."""
    if len(content) > MAX_BYTES:
        return content
    if not is_whole:
        raise EOFError("it ends early")
    if unused:
        raise ValueError("bytes follow its end")
    return content


_COMPRESSORS: dict[str, tuple[tuple[bytes, ...], Callable[[bytes], bytes]]] = {
    "xz": ((b"\xfd7zXZ\x00",), _unxz),
    "lzma": ((b"\x5d\x00\x00",), _unxz),
    "zstd": ((b"\x28\xb5\x2f\xfd",), _unzstd),
    "zlib": ((b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda"), _inflate),
}


def _load(content: bytes, where: str) -> dict[str, Any]:
    """Load tensors and plain containers only; whatever asks for more is refused."""
    if not content.startswith((b"PK\x03\x04", b"\x80\x02")):
        raise DataError(f"{where}: not a torch.save file; give {_FORMS}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if content.startswith(b"PK"):
                _check_archive(content, where)
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{where}: holds more than tensors and plain containers, or is damaged; nothing was "
            "executed, save its state dict and import that"
        ) from error
    except DataError:
        raise
    # The file is foreign bytes: its readers raise whatever they stumble over.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise DataError(f"{where}: damaged ({reason}); {_AGAIN}") from error
    if not _is_by_name(loaded):
        raise DataError(f"{where}: not a dict by name; give {_FORMS}")
    return loaded


def _check_archive(content: bytes, where: str) -> None:
    """Refuse what torch.save never writes, a compressed part, and a part whose checksum differs:
    torch unpacks the one to any size and overlooks the other."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise DataError(f"{where}: its archive is compressed within; give {_FORMS}")
        if sum(part.file_size for part in parts) > MAX_BYTES:
            raise DataError(f"{where}: unpacks to more than {MAX_BYTES} bytes; give {_FORMS}")
        damaged = archive.testzip()
    if damaged is not None:
        raise DataError(f"{where}: damaged (checksum of {damaged[:80]!r} differs); {_AGAIN}")


def _is_by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and len(name) <= MAX_NAME for name in value
    )


def _mixed(content: dict[str, Any], where: str) -> dict[str, Tensor | Integers]:
    weights, meta = _part(content, "w", where), _part(content, "m", where)
    tensors: dict[str, Tensor | Integers] = {}
    known: set[str] = set()
    for name, kind in meta.items():
        if isinstance(kind, str) and kind in _PASSTHROUGH:
            tensors[name] = _float(weights.get(name), name, where)
            known.add(name)
            continue
        q, scale = f"{name}.q", f"{name}.scale"
        tensors[name] = _integers(weights.get(q), weights.get(scale), kind, (name, where))
        known |= {q, scale}
    foreign = sorted(set(weights) - known)
    if foreign:
        raise DataError(f"{where}: tensor {foreign[0]!r} is not in the file's meta; {_INSTEAD}")
    return tensors


def _integers(q: Any, scale: Any, kind: Any, at: tuple[str, str]) -> Integers:
    """Check one quantized tensor; `kind` is what the meta says of it."""
    name, where = at
    plain = kind if isinstance(kind, dict) else {}
    named = plain.get("type", kind)
    match = _INTEGERS.fullmatch(named) if isinstance(named, str) and plain else None
    if match is None:
        shown = _shown(named)
        raise DataError(
            f"{where}: tensor {name!r} is stored in an unknown way ({shown}); {_INSTEAD}"
        )
    if "block_size" in plain:
        raise DataError(
            f"{where}: tensor {name!r} has scales per block, only rows are read; {_INSTEAD}"
        )
    if not (_is_plain(q) and _is_plain(scale) and scale.is_floating_point()):
        raise DataError(f"{where}: tensor {name!r} lacks its .q or its .scale; {_AGAIN}")
    bits, is_packed = int(match[1]), q.dtype == torch.uint8
    if not (q.dtype == torch.int8 or (is_packed and bits == 4 and q.ndim > 0)):
        raise DataError(
            f"{where}: tensor {name!r} has {bits}-bit integers in {q.dtype}; {_INSTEAD}"
        )
    if scale.ndim > 1 or (scale.ndim == 1 and tuple(scale.shape) != tuple(q.shape[:1])):
        raise DataError(
            f"{where}: tensor {name!r} of shape {tuple(q.shape)} has scales of shape "
            f"{tuple(scale.shape)}, expected one per row; {_INSTEAD}"
        )
    return Integers(q, scale, bits, is_packed, _num_columns(q, plain, at) if is_packed else None)


def _num_columns(q: Tensor, meta: dict[str, Any], at: tuple[str, str]) -> int | None:
    match meta.get("orig_shape"):
        case None:
            return None
        case [*_, int(width)] if (width + 1) // 2 == q.shape[-1]:
            return width
        case shape:
            raise DataError(
                f"{at[1]}: tensor {at[0]!r} of {tuple(q.shape)} bytes does not pack its "
                f"orig_shape ({_shown(shape)}); {_INSTEAD}"
            )


def _shown(value: Any) -> str:
    """A short text as it is; of anything else the type: nested containers print without end."""
    return repr(value[:80]) if isinstance(value, str) else type(value).__name__


def _baseline(content: dict[str, Any], where: str) -> dict[str, Tensor | Integers]:
    form = content["__quant_format__"]
    if not isinstance(form, str) or form != BASELINE_FORMAT:
        raise DataError(
            f"{where}: format {_shown(form)} is not known, {BASELINE_FORMAT!r} is; {_INSTEAD}"
        )
    scales = _part(content, "scales", where)
    tensors: dict[str, Tensor | Integers] = {
        name: _integers(q, scales.get(name), {"type": "int8"}, (name, where))
        for name, q in _part(content, "quantized", where).items()
    }
    for name, value in _part(content, "passthrough", where).items():
        if name in tensors:
            raise DataError(f"{where}: tensor {name!r} is given twice; {_INSTEAD}")
        tensors[name] = _float(value, name, where)
    return tensors


def _part(content: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    part = content.get(key)
    if not isinstance(part, dict) or not _is_by_name(part):
        raise DataError(f"{where}: its {key!r} is not a dict by name; give {_FORMS}")
    return part


def _float(value: Any, name: str, where: str) -> Tensor:
    if not _is_plain(value):
        raise DataError(f"{where}: {name!r} is missing or no plain tensor; give {_FORMS}")
    if value.dtype not in _WIDTHS:
        raise DataError(
            f"{where}: tensor {name!r} is {value.dtype}, expected a float; import a file of "
            "weights only"
        )
    return value


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_nested
        # A view that repeats a few bytes would be written out in full.
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )
