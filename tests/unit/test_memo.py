"""What a process keeps from one training to the next, and that no result shows it."""

import shutil
from dataclasses import replace

import pytest
import torch

from tests import tiny
from tests.ticking import trainings_count_work
from trainer.data.shards import load_dataset
from trainer.run import train
from trainer.runtime.distributed import Ranks
from trainer.runtime.tensors import load_tensors, saved_names
from trainer.specs.task import train_task
from trainer.train.memo import Memo, Recent

ALONE = Ranks()


def task_of(**values):
    return train_task(tiny.recipe({path.replace("__", "."): v for path, v in values.items()}))


def test_results_are_the_same_with_a_memo_and_without(tiny_dataset, tmp_path):
    memo, facts = Memo(), {}
    for warmdown in (2, 4):
        for name, given in (("with", memo), ("without", None)):
            task, folder = task_of(train__schedule__warmdown_iters=warmdown), tmp_path / name
            result = train(task, tiny_dataset, folder / str(warmdown), ALONE, memo=given)
            facts[name, warmdown] = replace(result, train_clock_s=0.0, clock_s={})

    for warmdown in (2, 4):
        assert facts["with", warmdown] == facts["without", warmdown]
        banks = [tmp_path / name / str(warmdown) / "bank" for name in ("with", "without")]
        for entry in saved_names(banks[0]):
            one, other = (load_tensors(bank, entry) for bank in banks)
            assert all(torch.equal(one[name], other[name]) for name in one)


class Watched(Recent[float]):
    """A cache that counts what is put into it."""

    num_kept = 0

    def keep(self, key, value):
        self.num_kept += 1
        return super().keep(key, value)


def test_an_untrained_model_is_scored_once(tiny_dataset, tmp_path):
    memo = Memo()
    memo.untrained_bpb = Watched(64)
    first = train(task_of(), tiny_dataset, tmp_path / "1", ALONE, memo=memo)

    again = train(
        task_of(train__schedule__warmdown_iters=2), tiny_dataset, tmp_path / "2", ALONE, memo=memo
    )

    assert memo.untrained_bpb.num_kept == 1
    assert again.untrained_val_bpb == first.untrained_val_bpb


@pytest.mark.parametrize(
    "values",
    [
        {"train__seed": 7},
        {"model__num_layers": 3},
        {"train__dtype": "bfloat16"},
        {"train__attention": {"name": "torch"}},
        {"evaluate__window": 16, "evaluate__stride": 8},
    ],
)
def test_another_model_or_score_is_not_taken_for_it(tiny_dataset, tmp_path, values):
    memo = Memo()
    memo.untrained_bpb = Watched(64)
    train(task_of(), tiny_dataset, tmp_path / "1", ALONE, memo=memo)

    result = train(task_of(**values), tiny_dataset, tmp_path / "2", ALONE, memo=memo)

    assert memo.untrained_bpb.num_kept == 2
    alone = train(task_of(**values), tiny_dataset, tmp_path / "3", ALONE)
    assert result.untrained_val_bpb == alone.untrained_val_bpb


def test_the_text_is_read_once(tiny_dataset, tmp_path):
    copy = load_dataset(shutil.copytree(tiny_dataset.folder, tmp_path / "data"))
    memo = Memo()
    first = train(task_of(), copy, tmp_path / "1", ALONE, memo=memo)
    for shard in copy.manifest.splits["val"].shards:
        (copy.folder / shard.file).unlink()

    assert train(task_of(), copy, tmp_path / "2", ALONE, memo=memo).parity_bpb == first.parity_bpb


def test_a_memo_keeps_the_last_few():
    recent = Recent(2)
    recent.keep("a", 1)
    recent.keep("b", 2)
    assert recent.get("a") == 1

    recent.keep("c", 3)

    assert [recent.get(key) for key in "abc"] == [1, None, 3]


def test_a_warm_process_is_not_warmed_up_again(tiny_dataset, tmp_path, monkeypatch):
    trainings_count_work(monkeypatch)
    memo, task = Memo(), task_of(train__warmup_steps=8)
    first = train(task, tiny_dataset, tmp_path / "1", ALONE, memo=memo)

    again = train(task, tiny_dataset, tmp_path / "2", ALONE, memo=memo)
    other = task_of(train__warmup_steps=8, train__micro_batch_tokens=64)
    anew = train(other, tiny_dataset, tmp_path / "3", ALONE, memo=memo)

    assert again.clock_s["warmup"] < min(first.clock_s["warmup"], anew.clock_s["warmup"]) / 4
    assert again.parity_bpb == first.parity_bpb
