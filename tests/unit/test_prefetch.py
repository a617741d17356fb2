"""Batches that are read ahead: the same rows, in whatever order they are asked for."""

import threading

import numpy as np
import pytest
import torch

from tests import tiny
from trainer.data.loader import Loader
from trainer.data.shards import TokenStream, write_shard
from trainer.errors import DataError
from trainer.run import train
from trainer.runtime.distributed import Ranks
from trainer.specs.task import train_task
from trainer.train.prefetch import Prefetcher

SHAPE = (4, 6)


@pytest.fixture
def loader(tmp_path):
    write_shard(tmp_path / "0.bin", np.arange(203))
    stream = TokenStream([tmp_path / "0.bin"])
    return Loader(stream, seq_len=5, batch_tokens=20, order="shuffled", seed=7)


@pytest.fixture
def open_prefetcher():
    """Make prefetchers on a CPU, and close them after the test."""
    opened = []

    def start(read):
        opened.append(Prefetcher(read, SHAPE, torch.device("cpu")))
        return opened[-1]

    yield start
    for prefetcher in opened:
        prefetcher.close()


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize(
    "steps",
    [range(8), [3, 4, 5, 0, 1], [2, 2, 3, 3], [9, 7, 5], [0, 1, 0, 1, 2]],
    ids=["from the first", "rolled back", "each twice", "backwards", "a restart"],
)
def test_rows_are_the_loaders_in_any_order_of_asking(loader, open_prefetcher, steps):
    prefetcher = open_prefetcher(lambda step, out: loader.rows(step, out=out))

    for step in steps:
        assert prefetcher.take(step).tolist() == loader.rows(step).tolist()


def test_rows_that_were_handed_out_stay_as_they_are(loader, open_prefetcher):
    prefetcher = open_prefetcher(lambda step, out: loader.rows(step, out=out))

    taken = [prefetcher.take(step) for step in range(6)]

    assert [rows.tolist() for rows in taken] == [loader.rows(step).tolist() for step in range(6)]


def test_the_next_steps_rows_are_read_without_being_asked_for(open_prefetcher):
    read = threading.Event()
    prefetcher = open_prefetcher(lambda step, out: read.set() if step == 5 else None)

    prefetcher.take(4)

    assert read.wait(60)


def test_what_a_read_meets_is_raised_where_its_rows_are_asked_for(loader, open_prefetcher):
    def read(step, out):
        if step == 2:
            raise DataError("0.bin: truncated")
        loader.rows(step, out=out)

    prefetcher = open_prefetcher(read)
    assert prefetcher.take(1).tolist() == loader.rows(1).tolist()

    with pytest.raises(DataError, match="truncated"):
        prefetcher.take(2)
    assert prefetcher.take(3).tolist() == loader.rows(3).tolist()


def test_a_failed_read_ahead_is_nothing_to_who_asks_for_another_step(loader, open_prefetcher):
    def read(step, out):
        if step == 1:
            raise DataError("0.bin: truncated")
        loader.rows(step, out=out)

    prefetcher = open_prefetcher(read)
    prefetcher.take(0)

    assert prefetcher.take(7).tolist() == loader.rows(7).tolist()


def test_closing_ends_the_thread(open_prefetcher):
    prefetcher = open_prefetcher(lambda step, out: None)
    prefetcher.take(0)
    assert threads()

    prefetcher.close()

    assert not threads()


def test_on_a_cpu_no_thread_reads_ahead(tiny_dataset, tmp_path):
    asked, seen = [], []

    def look(step, val_bpb):
        asked.append(step)
        seen.extend(threads())

    train(train_task(tiny.recipe()), tiny_dataset, tmp_path, Ranks(), steer=look)

    assert asked
    assert not seen
