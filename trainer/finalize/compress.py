"""General compressors by name and level: zstd, brotli, xz and zlib, with settings for weights.

No other compressor stands in when a library is missing: zlib can be 5 % larger than zstd, which
has put submissions over the cap unnoticed (techniques 2.26). One thread, so equal input gives
equal bytes for one version of the library. Only zstd says how many bytes a frame holds, so a
reader has to know that from elsewhere.

Weights hold no repeats worth naming, yet every matcher finds chance ones and pays for them, so
windows and searches are kept short. What the block matrices of a trained pr414 (25,952,256
integers, by columns) take, as the library has it and as it is here:

            step 1/31: library        here    sd12.85: library        here
    zstd 22        13,201,860    13,031,996         10,945,028    10,695,079
    brotli 11      12,906,987    12,899,152         10,568,501    10,563,354
    lzma 9         13,460,928    13,247,572         11,368,304    10,948,708
    zlib 9         14,697,934    13,054,136         12,225,956    10,721,750
"""

import importlib
import io
from collections.abc import Iterator
from typing import Any, Final

from trainer.errors import DataError, UsageError
from trainer.specs.final import Brotli, Lzma, Zlib, Zstd

General = Zstd | Brotli | Lzma | Zlib
Frame = bytes | memoryview

# The level still picks the parser. zstd's, whose prices adapt, settles on taking chance matches
# of three bytes if it may.
SEARCH: Final = {"window_log": 17, "hash_log": 10, "chain_log": 10, "search_log": 4, "min_match": 6}
BROTLI: Final = {"lgwin": 10, "lgblock": 20}
XZ: Final = {"dict_size": 4096, "lc": 0, "lp": 0, "pb": 0}
ZLIB: Final = {"wbits": 9, "memLevel": 9, "strategy": 1}  # Z_FILTERED: no match below 6 bytes
# The most that a reader grants: what a spec can ask zstd for, and what decoding XZ takes with room.
MAX_WINDOW_BYTES: Final = 2**27
XZ_MEMORY_BYTES: Final = 2**20
CHUNK_BYTES: Final = 2**16

# Of each kind the module and the name of its error.
_LIBRARIES: Final = {
    "zstd": ("zstandard", "ZstdError"),
    "brotli": ("brotli", "error"),
    "lzma": ("lzma", "LZMAError"),
    "zlib": ("zlib", "error"),
}
_FIX = "write the file again"


class _Broken(Exception):
    """A frame that is not one whole stream of the size that was told."""


def compress(data: bytes, spec: General) -> bytes:
    """Compress into one frame; UsageError when the library is missing."""
    library, _ = _library(spec.kind)
    match spec:
        case Zstd():
            parameters = library.ZstdCompressionParameters.from_level(
                spec.level,
                **_search(spec),
                source_size=len(data),
                write_checksum=True,
                write_content_size=True,
                threads=0,
            )
            return library.ZstdCompressor(compression_params=parameters).compress(data)
        case Brotli():
            return library.compress(data, quality=spec.level, **BROTLI)
        case Lzma():
            filters = [{"id": library.FILTER_LZMA2, "preset": spec.level, **XZ}]
            return library.compress(data, library.FORMAT_XZ, library.CHECK_CRC32, None, filters)
        case Zlib():
            encoder = library.compressobj(spec.level, **ZLIB)
            return encoder.compress(data) + encoder.flush()


def _search(spec: Zstd) -> dict[str, int | bool]:
    if not spec.long_distance:
        return SEARCH
    # The level's own tables, as PR #610 had them: in SEARCH's short ones the parsers of level 16
    # and above pass over every long-distance match (zstd 1.5.7).
    window = {} if spec.window_log is None else {"window_log": spec.window_log}
    return {"enable_ldm": True, **window}


def decompress(frame: Frame, kind: str, num_bytes: int, where: str) -> bytes | bytearray:
    """Return the `num_bytes` bytes that a frame holds, allocating little more than those.

    DataError, starting with `where`, for anything but one whole frame of exactly that size.
    """
    library, error_type = _library(kind)
    try:
        if kind == "zstd":
            return _decompress_zstd(library, frame, num_bytes)
        data, size = bytearray(num_bytes), 0
        for chunk in _chunks(library, frame, kind):
            if size + len(chunk) > num_bytes:
                raise _Broken(f"more than the {num_bytes} bytes expected")
            data[size : size + len(chunk)] = chunk
            size += len(chunk)
        if size < num_bytes:
            raise _Broken(f"{size} bytes instead of {num_bytes}")
        return data
    except (error_type, _Broken) as error:
        raise DataError(f"{where}: broken {kind} frame ({error}); {_FIX}") from error


def peek(frame: Frame, kind: str, num_bytes: int, where: str) -> bytes:
    """Return the first bytes that a frame holds, at most `num_bytes`, checksum unseen.

    Lets a reader judge the sizes that a header claims before it allocates the payload.
    """
    library, error_type = _library(kind)
    head = bytearray()
    try:
        if kind == "zstd":
            decompressor = library.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
            return decompressor.stream_reader(io.BytesIO(frame)).read(num_bytes)
        for chunk in _chunks(library, frame, kind):
            head += chunk
            if len(head) >= num_bytes:
                break
        return bytes(head[:num_bytes])
    except (error_type, _Broken) as error:
        raise DataError(f"{where}: broken {kind} frame ({error}); {_FIX}") from error


def _decompress_zstd(library: Any, frame: Frame, num_bytes: int) -> bytes:
    """In one call, which allocates what the frame declares: judged first, because the library
    ignores a limit of its own once a frame declares a size."""
    declared = library.get_frame_parameters(frame)
    if declared.content_size != num_bytes or not num_bytes:
        raise _Broken(f"declares {declared.content_size} bytes instead of {num_bytes}")
    if not declared.has_checksum or declared.dict_id:
        raise _Broken("without a checksum or with a dictionary")
    return library.ZstdDecompressor().decompress(frame, allow_extra_data=False)


def _chunks(library: Any, frame: Frame, kind: str) -> Iterator[bytes]:
    """Yield what a frame holds in small pieces; end only where both stream and frame do."""
    decoder = {"brotli": _Brotli, "lzma": _Xz, "zlib": _Zlib}[kind](library)
    for start in range(0, len(frame), CHUNK_BYTES):
        left = bytes(frame[start : start + CHUNK_BYTES])
        while not decoder.is_done:
            chunk, left = decoder.step(left)
            if not chunk:
                break
            yield chunk
        if decoder.is_done and (left or start + CHUNK_BYTES < len(frame)):
            raise _Broken("goes on behind its end")
    if not decoder.is_done:
        raise _Broken("ends too soon")


class _Brotli:
    """`step` takes input and returns some output, empty when it wants more, and what is left of
    the input; so for all three."""

    def __init__(self, library: Any) -> None:
        self._stream = library.Decompressor()

    def step(self, data: bytes) -> tuple[bytes, bytes]:
        # Keeps what it cannot use yet, and fails on what comes after the end.
        return self._stream.process(data, output_buffer_limit=CHUNK_BYTES), b""

    @property
    def is_done(self) -> bool:
        return self._stream.is_finished()


class _Xz:
    def __init__(self, library: Any) -> None:
        self._stream = library.LZMADecompressor(library.FORMAT_XZ, XZ_MEMORY_BYTES)

    def step(self, data: bytes) -> tuple[bytes, bytes]:
        return self._stream.decompress(data, CHUNK_BYTES), self._stream.unused_data

    @property
    def is_done(self) -> bool:
        return self._stream.eof


class _Zlib:
    def __init__(self, library: Any) -> None:
        self._stream = library.decompressobj()

    def step(self, data: bytes) -> tuple[bytes, bytes]:
        chunk = self._stream.decompress(data, CHUNK_BYTES)
        return chunk, self._stream.unconsumed_tail or self._stream.unused_data

    @property
    def is_done(self) -> bool:
        return self._stream.eof


def _library(kind: str) -> tuple[Any, type[Exception]]:
    """Import a kind's module; return it and its error."""
    name, error = _LIBRARIES[kind]
    try:
        library: Any = importlib.import_module(name)
    except ImportError as missing:
        raise UsageError(
            f"final.compress.kind={kind}: the {name} package is missing and nothing replaces it; "
            "install it or name another kind"
        ) from missing
    return library, getattr(library, error)
