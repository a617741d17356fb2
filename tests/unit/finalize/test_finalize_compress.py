import math
import subprocess
import sys
import tracemalloc
from random import Random

import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import DataError
from trainer.finalize.compress import compress, decompress, peek
from trainer.specs.final import Zstd

LIMIT = 1 << 16
TEXT = b"one frame with size and checksum " * 20


def frame_of(data, **changes):
    options = {"write_checksum": True, "write_content_size": True} | changes
    return zstandard.ZstdCompressor(level=3, **options).compress(data)


@given(st.binary(min_size=1, max_size=500))
def test_round_trip(data):
    assert decompress(compress(data, Zstd(level=3)), len(data), "x") == data


def test_equal_input_gives_equal_bytes():
    assert compress(TEXT, Zstd()) == compress(TEXT, Zstd())


def test_frame_carries_size_and_checksum():
    declared = zstandard.get_frame_parameters(compress(TEXT, Zstd()))

    assert declared.content_size == len(TEXT)
    assert declared.has_checksum


def test_level_reaches_the_compressor():
    random = Random(0)
    data = b"".join(random.choice([b"tall ", b"tale ", b"tell "]) for _ in range(5_000))

    assert len(compress(data, Zstd(level=22))) < len(compress(data, Zstd(level=1)))


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"", "not a zstd frame"),
        (b"neither zstd nor anything", "not a zstd frame"),
        (frame_of(TEXT)[:-1], "broken"),
        (frame_of(TEXT) + b"\0", "broken"),
        (frame_of(TEXT) + frame_of(TEXT), "broken"),
        (frame_of(TEXT)[:-1] + bytes([frame_of(TEXT)[-1] ^ 1]), "broken"),
        (frame_of(TEXT, write_content_size=False), "declares no size"),
        (frame_of(b""), "declares no size"),
        (frame_of(TEXT, write_checksum=False), "no checksum"),
        (frame_of(b"\0" * (LIMIT + 1)), "declares 65537 bytes"),
        (bytes.fromhex("28b52ffde4") + (2**45).to_bytes(8, "little"), "declares 35184372088832"),
    ],
)
def test_hostile_frame_is_refused_in_one_line(frame, reason):
    with pytest.raises(DataError) as caught:
        decompress(frame, LIMIT, "file.fw")

    assert str(caught.value).startswith("file.fw: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_skippable_frame_is_refused():
    frame = bytes.fromhex("502a4d18") + (4).to_bytes(4, "little") + b"skip"

    with pytest.raises(DataError, match=r"^file\.fw: "):
        decompress(frame, LIMIT, "file.fw")


def test_window_bomb_is_refused():
    # Header by hand: single segment off, checksum, 8-byte size, window 2**30, size 8.
    frame = bytes.fromhex("28b52ffd") + bytes([0xC4, 20 << 3]) + (8).to_bytes(8, "little")

    with pytest.raises(DataError, match=r"asks for a window of 1073741824 bytes"):
        decompress(frame, LIMIT, "file.fw")


def test_bomb_costs_no_memory():
    bomb = frame_of(b"\0" * (1 << 26))
    tracemalloc.start()

    with pytest.raises(DataError, match="declares 67108864 bytes"):
        decompress(bomb, LIMIT, "file.fw")

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_peek_reads_the_beginning_only():
    assert peek(frame_of(TEXT), 9, "x") == TEXT[:9]


def test_gaussian_integers_cost_little_more_than_their_entropy():
    noise = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))
    q = (noise * 31 / 12.85).round().to(torch.int8)
    shares = torch.bincount(q.int() + 31).double() / q.numel()
    entropy_bytes = -float(torch.xlogy(shares, shares).sum()) / math.log(2) * q.numel() / 8
    # A table of names before them once taught the parser to take chance matches, at 7 %.
    table = b"".join(b'["blocks.%d.attention.query.weight",[512,512],6],' % i for i in range(60))

    frame = compress(table + q.numpy().tobytes(), Zstd())

    assert len(frame) < 1.04 * entropy_bytes


@pytest.mark.parametrize("level", range(1, 23))
def test_every_level_round_trips(level):
    assert decompress(compress(TEXT, Zstd(level=level)), LIMIT, "x") == TEXT


def test_missing_library_is_an_error_that_names_it():
    program = (
        "import sys; sys.modules['zstandard'] = None\n"
        "from trainer.finalize.compress import compress\n"
        "from trainer.specs.final import Zstd\n"
        "compress(b'data', Zstd())"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.returncode != 0
    assert "UsageError: compress: the zstandard package is missing" in done.stderr


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
    assert decompress(far, len(data), "x") == data


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
    assert decompress(frame, len(data), "x") == data
    assert peek(frame, 9, "x") == data[:9]
