from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.shards import TokenStream, open_shard, write_shard
from trainer.errors import DataError


@given(tokens=st.lists(st.integers(0, 65535), min_size=1, max_size=50))
@settings(max_examples=30, deadline=None)
def test_a_written_shard_opens_to_the_same_tokens(tmp_path_factory, tokens):
    path = tmp_path_factory.mktemp("shard") / "x.bin"

    write_shard(path, np.array(tokens))

    assert open_shard(path).tolist() == tokens


def test_a_shard_has_the_published_layout(tmp_path: Path):
    path = tmp_path / "x.bin"

    write_shard(path, np.array([1, 515]))

    content = path.read_bytes()
    header = np.frombuffer(content[:1024], dtype="<i4").tolist()
    assert header == [20240520, 1, 2, *[0] * 253]
    assert content[1024:] == bytes([1, 0, 3, 2])


def test_a_truncated_shard_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "x.bin"
    write_shard(path, np.ones(100, dtype=np.int64))
    path.write_bytes(path.read_bytes()[:900])

    with pytest.raises(DataError) as caught:
        open_shard(path)

    assert str(caught.value).startswith(f"{path}: truncated: 900 bytes")


def test_a_shard_cut_in_its_tokens_says_both_sizes(tmp_path: Path):
    path = tmp_path / "x.bin"
    write_shard(path, np.ones(100, dtype=np.int64))
    path.write_bytes(path.read_bytes()[:1100])

    with pytest.raises(DataError) as caught:
        open_shard(path)

    assert str(caught.value) == (
        f"{path}: truncated: header says 100 tokens (1,224 bytes), file has 1,100 bytes; "
        f"prepare or fetch it again"
    )


def test_a_shard_with_bytes_behind_its_tokens_is_refused(tmp_path: Path):
    path = tmp_path / "x.bin"
    write_shard(path, np.ones(100, dtype=np.int64))
    path.write_bytes(path.read_bytes() + b"xx")

    with pytest.raises(DataError, match="too long: header says 100 tokens"):
        open_shard(path)


@pytest.mark.parametrize(
    ("index", "value", "fault"),
    [(0, 7, "not a shard: magic 7"), (1, 2, "shard version 2"), (2, -5, "header says -5 tokens")],
)
def test_a_wrong_header_field_is_named(tmp_path: Path, index: int, value: int, fault: str):
    path = tmp_path / "x.bin"
    write_shard(path, np.ones(100, dtype=np.int64))
    content = bytearray(path.read_bytes())
    content[4 * index : 4 * index + 4] = np.array([value], dtype="<i4").tobytes()
    path.write_bytes(content)

    with pytest.raises(DataError, match=fault):
        open_shard(path)


def test_a_missing_shard_is_refused_by_name(tmp_path: Path):
    with pytest.raises(DataError, match=r"gone\.bin: No such file"):
        open_shard(tmp_path / "gone.bin")


@pytest.mark.parametrize("token", [-1, 65536])
def test_a_token_that_does_not_fit_is_refused(tmp_path: Path, token: int):
    with pytest.raises(DataError, match=f"token id {token} does not fit"):
        write_shard(tmp_path / "x.bin", np.array([1, token]))


def test_a_refused_write_leaves_no_file(tmp_path: Path):
    with pytest.raises(DataError):
        write_shard(tmp_path / "x.bin", np.array([], dtype=np.int64))

    assert list(tmp_path.iterdir()) == []


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_stream_reads_like_its_shards_joined(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("stream")
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    joined = np.arange(sum(sizes))
    parts = np.split(joined, np.cumsum(sizes)[:-1])
    for index, part in enumerate(parts):
        write_shard(folder / f"{index}.bin", part)
    start = data.draw(st.integers(0, len(joined)))
    stop = data.draw(st.integers(start, len(joined)))

    stream = TokenStream(list(folder.iterdir()))

    assert len(stream) == len(joined)
    assert stream.read(start, stop).tolist() == joined[start:stop].tolist()


def test_a_stream_takes_shards_in_name_order(make_stream, tmp_path: Path):
    make_stream(np.array([1]), np.array([2]), np.array([3]))

    stream = TokenStream(sorted(tmp_path.iterdir(), reverse=True))

    assert stream.read(0, 3).tolist() == [1, 2, 3]


def test_reading_past_the_end_is_an_error(make_stream):
    stream = make_stream(np.arange(4))

    with pytest.raises(IndexError):
        stream.read(2, 5)
