import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.loader import Loader, permutation
from trainer.data.shards import TokenStream, write_shard
from trainer.errors import DataError, UsageError


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> TokenStream:
    """103 tokens, each its own position, in two shards."""
    folder = tmp_path_factory.mktemp("loader")
    write_shard(folder / "0.bin", np.arange(60))
    write_shard(folder / "1.bin", np.arange(60, 103))
    return TokenStream(list(folder.iterdir()))


@given(
    step=st.integers(0, 40),
    order=st.sampled_from(["sequential", "shuffled"]),
    world_size=st.sampled_from([1, 2, 3, 4, 6, 12]),
)
@settings(max_examples=60, deadline=None)
def test_any_number_of_workers_reads_the_same_batch(stream, step, order, world_size):
    loader = Loader(stream, seq_len=5, batch_tokens=60, order=order, seed=7)

    shares = [loader.rows(step, rank, world_size) for rank in range(world_size)]

    assert np.array_equal(np.concatenate(shares), loader.rows(step))


@pytest.mark.parametrize("order", ["sequential", "shuffled"])
def test_every_token_after_the_first_is_a_target_once_in_an_epoch(stream, order):
    loader = Loader(stream, seq_len=6, batch_tokens=6, order=order, seed=7)

    rows = np.concatenate([loader.rows(step) for step in range(loader.epoch_sequences)])

    assert loader.epoch_sequences == 17
    assert sorted(rows[:, 1:].ravel().tolist()) == list(range(1, 103))


def rows_one_by_one(stream, seq_len, batch, order, seed, step):
    """Slow plain twin: each row's own read, and its sequence from the epoch's own order."""
    per_epoch, rows = (len(stream) - 1) // seq_len, []
    for position in range(step * batch, (step + 1) * batch):
        epoch, index = divmod(position, per_epoch)
        if order == "shuffled":
            index = int(permutation(per_epoch, seed, epoch)[index])
        rows.append(stream.read(index * seq_len, (index + 1) * seq_len + 1).tolist())
    return rows


@given(
    step=st.integers(0, 40),
    order=st.sampled_from(["sequential", "shuffled"]),
    seq_len=st.integers(1, 40),
    batch=st.integers(1, 30),
)
@settings(max_examples=80)
def test_rows_are_those_that_the_plain_twin_reads_one_by_one(stream, step, order, seq_len, batch):
    loader = Loader(stream, seq_len, batch_tokens=batch * seq_len, order=order, seed=7)

    expected = rows_one_by_one(stream, seq_len, batch, order, 7, step)

    assert loader.rows(step).tolist() == expected


def test_rows_can_be_read_into_memory_that_is_there(stream):
    loader = Loader(stream, seq_len=10, batch_tokens=40, order="sequential", seed=7)
    out = np.zeros((2, 11), dtype=np.int64)

    loader.rows(3, 1, 2, out)

    assert out.tolist() == loader.rows(3)[2:].tolist()
    with pytest.raises(ValueError, match=r"out is \(4, 11\), the share is \(2, 11\)"):
        loader.rows(3, 1, 2, np.zeros((4, 11), dtype=np.int64))


def test_neighbours_in_the_stream_are_read_at_once(stream, monkeypatch):
    reads = []
    read = TokenStream.read
    monkeypatch.setattr(TokenStream, "read", lambda *a: reads.append(a[1:]) or read(*a))

    Loader(stream, seq_len=10, batch_tokens=70, order="sequential", seed=7).rows(1)

    assert reads == [(70, 101), (0, 41)]


def test_a_row_is_a_run_of_the_stream_and_its_neighbour_shares_one_token(stream):
    loader = Loader(stream, seq_len=10, batch_tokens=20, order="sequential", seed=7)

    rows = loader.rows(0)

    assert rows.dtype == np.int64
    assert rows.tolist() == [list(range(11)), list(range(10, 21))]


def test_the_stream_wraps_after_its_last_whole_sequence(stream):
    loader = Loader(stream, seq_len=10, batch_tokens=70, order="sequential", seed=7)

    assert loader.rows(1)[:, 0].tolist() == [70, 80, 90, 0, 10, 20, 30]


def test_a_sequence_needs_a_target_for_its_last_input(make_stream):
    loader = Loader(
        make_stream(np.arange(20)), seq_len=10, batch_tokens=10, order="sequential", seed=7
    )

    assert loader.epoch_sequences == 1
    assert loader.rows(1)[:, 0].tolist() == [0]


def test_a_batch_may_be_larger_than_the_stream(stream):
    loader = Loader(stream, seq_len=50, batch_tokens=250, order="sequential", seed=7)

    assert loader.rows(0)[:, 0].tolist() == [0, 50, 0, 50, 0]


def test_epochs_are_shuffled_differently(stream):
    loader = Loader(stream, seq_len=6, batch_tokens=17 * 6, order="shuffled", seed=7)

    first, second = loader.rows(0), loader.rows(1)

    assert not np.array_equal(first, second)
    assert sorted(first[:, 0].tolist()) == sorted(second[:, 0].tolist())


def test_seeds_shuffle_differently(stream):
    batches = [
        Loader(stream, seq_len=6, batch_tokens=60, order="shuffled", seed=seed).rows(0)
        for seed in (1, 2)
    ]

    assert not np.array_equal(*batches)


def test_a_fresh_loader_resumes_at_any_step(stream):
    walked = Loader(stream, seq_len=6, batch_tokens=30, order="shuffled", seed=7)
    history = [walked.rows(step) for step in range(12)]

    resumed = Loader(stream, seq_len=6, batch_tokens=30, order="shuffled", seed=7)

    assert np.array_equal(resumed.rows(11), history[11])
    assert np.array_equal(walked.rows(2), history[2])


def test_a_world_size_that_does_not_divide_names_those_that_do(stream):
    loader = Loader(stream, seq_len=5, batch_tokens=60, order="sequential", seed=7)

    with pytest.raises(UsageError, match=r"workers=5 .* use one of 1, 2, 3, 4, 6, 12$"):
        loader.rows(0, rank=0, world_size=5)


def test_a_batch_that_is_no_whole_number_of_sequences_is_refused(stream):
    with pytest.raises(UsageError, match="batch_tokens=64 is not a multiple"):
        Loader(stream, seq_len=5, batch_tokens=64, order="sequential", seed=7)


def test_a_stream_shorter_than_one_sequence_is_refused(stream):
    with pytest.raises(DataError, match="needs 104 tokens, the stream has 103"):
        Loader(stream, seq_len=103, batch_tokens=103, order="sequential", seed=7)
