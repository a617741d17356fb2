import lzma
import math
import subprocess
import sys
import zlib
from random import Random

import brotli
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import DataError
from trainer.finalize.compress import compress, decompress, peek
from trainer.specs.final import Brotli, Lzma, Zlib, Zstd

TEXT = b"one frame with size and checksum " * 20
SPECS = {spec.kind: spec for spec in (Zstd(level=3), Brotli(level=5), Lzma(level=2), Zlib(level=4))}
KINDS = list(SPECS)
LEVELS = [
    *(Zstd(level=level) for level in range(1, 23)),
    *(Brotli(level=level) for level in range(12)),
    *(Lzma(level=level) for level in range(10)),
    *(Zlib(level=level) for level in range(1, 10)),
]


def refusal(frame, kind, num_bytes):
    """Return the one line with which a frame is refused."""
    with pytest.raises(DataError) as caught:
        decompress(frame, kind, num_bytes, "file.fw")
    text = str(caught.value)
    assert text.startswith("file.fw: ")
    assert text.endswith("; write the file again")
    assert "\n" not in text
    return text


def zstd_frame(data, **changes):
    options = {"write_checksum": True, "write_content_size": True} | changes
    return zstandard.ZstdCompressor(level=3, **options).compress(data)


def weights(scale, count=1 << 18):
    """Return integers as trained weights have them, and the bytes of their entropy."""
    noise = torch.randn(count, generator=torch.Generator().manual_seed(0))
    q = (noise * scale).round().to(torch.int8)
    shares = torch.bincount(q.int() + 128).double() / q.numel()
    entropy = -float(torch.xlogy(shares, shares).sum()) / math.log(2) * q.numel() / 8
    return q.numpy().tobytes(), entropy


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.binary(min_size=1, max_size=500), repeats=st.sampled_from([1, 2, 1000]))
def test_round_trip(kind, data, repeats):
    data *= repeats

    assert decompress(compress(data, SPECS[kind]), kind, len(data), "x") == data


@pytest.mark.parametrize("spec", LEVELS, ids=lambda spec: f"{spec.kind}-{spec.level}")
def test_every_level_round_trips(spec):
    assert decompress(compress(TEXT, spec), spec.kind, len(TEXT), "x") == TEXT


@pytest.mark.parametrize("kind", KINDS)
def test_equal_input_gives_equal_bytes(kind):
    assert compress(TEXT, SPECS[kind]) == compress(TEXT, SPECS[kind])


@pytest.mark.parametrize("low_high", [(Zstd, 1, 22), (Brotli, 1, 11), (Lzma, 0, 9), (Zlib, 1, 9)])
def test_level_reaches_the_compressor(low_high):
    spec, low, high = low_high
    random = Random(0)
    data = b"".join(random.choice([b"tall ", b"tale ", b"tell "]) for _ in range(5_000))

    assert len(compress(data, spec(level=high))) < len(compress(data, spec(level=low)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [31 / 12.85, 12.0])
def test_gaussian_integers_cost_little_more_than_their_entropy(kind, scale):
    data, entropy_bytes = weights(scale)
    # A table of names before them once taught zstd's parser to take chance matches, at 7 %.
    table = b"".join(b'["blocks.%d.attention.query.weight",[512,512],6],' % i for i in range(60))
    best = {"zstd": Zstd(), "brotli": Brotli(), "lzma": Lzma(), "zlib": Zlib()}[kind]

    frame = compress(table + data, best)

    # xz codes each integer bit by bit, in counts that forget: that costs it 5 %.
    assert len(frame) < entropy_bytes * (1.06 if kind == "lzma" else 1.04)


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_is_refused(kind):
    frame = compress(TEXT, SPECS[kind])

    for length in range(len(frame)):
        refusal(frame[:length], kind, len(TEXT))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extra", [b"\0", b"\0\0\0\0", b"more", bytes(1 << 17)])
@pytest.mark.parametrize("size", [len(TEXT), 1 << 17])
def test_bytes_behind_the_end_are_refused(kind, extra, size):
    data = TEXT if size == len(TEXT) else Random(0).randbytes(size)
    frame = compress(data, SPECS[kind])

    refusal(frame + extra, kind, size)
    refusal(frame + frame, kind, size)
    refusal(frame + frame, kind, 2 * size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0, 1, len(TEXT) - 1, len(TEXT) + 1, 1 << 20])
def test_another_size_than_expected_is_refused(kind, size):
    refusal(compress(TEXT, SPECS[kind]), kind, size)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_frame_is_refused(kind):
    for data in (b"", b"neither a frame nor anything", bytes(100), b"\xff" * 100):
        refusal(data, kind, 100)


@pytest.mark.parametrize("kind", ["zstd", "lzma", "zlib"])
def test_a_wrong_checksum_is_refused(kind):
    frame = bytearray(compress(TEXT, SPECS[kind]))
    # Of xz the check lies before index and footer, of the others at the end.
    at = frame.index(zlib.crc32(TEXT).to_bytes(4, "little")) if kind == "lzma" else len(frame) - 1
    frame[at] ^= 1

    assert "broken" in refusal(bytes(frame), kind, len(TEXT))


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (zstd_frame(TEXT, write_content_size=False), "declares"),
        (zstd_frame(b""), "declares 0 bytes"),
        (zstd_frame(TEXT, write_checksum=False), "without a checksum"),
        (bytes.fromhex("28b52ffde4") + (2**45).to_bytes(8, "little"), "declares 35184372088832"),
        (bytes.fromhex("502a4d18") + (4).to_bytes(4, "little") + b"skip", "declares"),
    ],
)
def test_a_zstd_frame_of_another_form_is_refused(frame, reason):
    assert reason in refusal(frame, "zstd", len(TEXT))


def test_an_xz_dictionary_that_takes_memory_is_refused():
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 26}]
    frame = lzma.compress(TEXT, lzma.FORMAT_XZ, lzma.CHECK_CRC32, None, filters)

    assert "Memory usage limit" in refusal(frame, "lzma", len(TEXT))


def test_a_zlib_dictionary_is_refused():
    encoder = zlib.compressobj(zdict=b"one frame")

    refusal(encoder.compress(TEXT) + encoder.flush(), "zlib", len(TEXT))


def bomb(kind):
    """Return a frame of few bytes that holds 64 MiB."""
    zeros = bytes(1 << 26)
    if kind == "zstd":
        return zstd_frame(zeros)
    if kind == "brotli":
        return brotli.compress(zeros, quality=1)
    if kind == "zlib":
        return zlib.compress(zeros, 1)
    return lzma.compress(zeros, filters=[{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 4096}])


@pytest.mark.parametrize("kind", KINDS)
def test_a_bomb_costs_no_memory(kind, tmp_path):
    (tmp_path / "bomb").write_bytes(bomb(kind))
    program = (
        "import pathlib, resource\n"
        "from trainer.errors import DataError\n"
        "from trainer.finalize.compress import decompress, peek\n"
        "frame = pathlib.Path('bomb').read_bytes()\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        f"assert peek(frame, {kind!r}, 9, 'x') == bytes(9)\n"
        "try:\n"
        f"    decompress(frame, {kind!r}, 1000, 'x')\n"
        "except DataError:\n"
        "    print(peak() - before)"
    )

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path
    )

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20 << 10  # KiB: the library's code, brotli's window


@pytest.mark.parametrize("kind", KINDS)
def test_peek_reads_the_beginning_only(kind):
    data = Random(0).randbytes(1 << 18)
    frame = compress(data, SPECS[kind])

    assert peek(frame, kind, 9, "x") == data[:9]
    assert peek(frame[: len(frame) // 2], kind, 100, "x") == data[:100]
    assert peek(frame, kind, 1 << 20, "x") == data


@pytest.mark.parametrize(("kind", "package"), [("zstd", "zstandard"), *((k, k) for k in KINDS[1:])])
def test_missing_library_is_an_error_that_names_it(kind, package):
    program = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from trainer.finalize.compress import compress\n"
        "from trainer.specs import final\n"
        f"compress(b'data', final.{type(SPECS[kind]).__name__}())"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.returncode != 0
    named = f"UsageError: final.compress.kind={kind}: the {package} package is missing"
    assert named in done.stderr


def apart(distance):
    """Return the same noise twice, `distance` bytes from start to start."""
    random = Random(0)
    noise = random.randbytes(1 << 14)
    return noise + random.randbytes(distance - len(noise)) + noise


def test_long_distance_finds_what_came_far_before():
    data = apart(1 << 20)

    near = compress(data, Zstd(level=21))
    far = compress(data, Zstd(level=21, long_distance=True, window_log=25))

    assert len(near) > len(data)
    assert len(far) < len(data) - (1 << 14) * 0.95
    assert decompress(far, "zstd", len(data), "x") == data


def test_the_window_bounds_how_far_long_distance_looks():
    data = apart(1 << 20)

    frame = compress(data, Zstd(level=21, long_distance=True, window_log=19))

    assert zstandard.get_frame_parameters(frame).window_size == 1 << 19
    assert len(frame) > len(data)


def test_the_widest_window_of_the_spec_is_read():
    # Incompressible, and more than the window, so that the frame asks for all of it.
    data = Random(0).randbytes(1 << 20) * 129

    frame = compress(data, Zstd(level=1, long_distance=True, window_log=27))

    assert zstandard.get_frame_parameters(frame).window_size == 1 << 27
    assert decompress(frame, "zstd", len(data), "x") == data
    assert peek(frame, "zstd", 9, "x") == data[:9]


def test_a_wider_window_is_refused_before_anything_is_read():
    # Header by hand: single segment off, checksum, 8-byte size, window 2**30, size 8.
    frame = bytes.fromhex("28b52ffd") + bytes([0xC4, 20 << 3]) + (8).to_bytes(8, "little")

    with pytest.raises(DataError, match=r"^file\.fw: broken zstd frame .*memory"):
        peek(frame, "zstd", 4, "file.fw")
