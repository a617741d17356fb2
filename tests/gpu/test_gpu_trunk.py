"""Trunks, tails and memory on a CUDA device."""

import pytest

from tests import tiny
from trainer.errors import OutOfMemory
from trainer.run import grow_trunk, train
from trainer.runtime.distributed import Ranks
from trainer.specs.task import Departure, train_task
from trainer.train.memo import Memo

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def ranks():
    return Ranks(device=torch.device("cuda", 0))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_branched_training_ends_where_a_straight_one_does(
    tiny_dataset, tmp_path, ranks, compiled
):
    memo, compiles = Memo(), {"train.compile": compiled, "train.warmup_steps": 2}
    flat = {"train.schedule.warmdown_iters": 0, "train.averages.swa": None}
    states = [(Departure(step=8), tmp_path / "state")]
    trunk = train_task(tiny.recipe(flat | compiles))
    grow_trunk(trunk, tiny_dataset, states, tmp_path / "work", ranks, memo=memo)
    task = train_task(tiny.recipe(compiles))

    tail = train(
        *(task, tiny_dataset, tmp_path / "tail", ranks), start=tmp_path / "state", memo=memo
    )

    straight = train(task, tiny_dataset, tmp_path / "straight", ranks, memo=memo)
    assert tail.steps_computed == 4
    assert tail.untrained_val_bpb == straight.untrained_val_bpb
    assert tail.final_train_loss == pytest.approx(straight.final_train_loss, rel=1e-3)
    assert tail.parity_bpb == pytest.approx(straight.parity_bpb, rel=1e-3)


def test_what_does_not_fit_the_device_says_so_and_leaves_room_again(tiny_dataset, tmp_path, ranks):
    task = train_task(tiny.recipe({"train.batch_tokens": 1 << 20}))
    # As a small device: 1 % of the memory, 1.4 GiB of an H200's.
    torch.cuda.set_per_process_memory_fraction(0.01, ranks.device)
    try:
        with pytest.raises(OutOfMemory, match=r"peak \S+ GiB allocated.*; lower train\.micro_b"):
            train(task, tiny_dataset, tmp_path / "large", ranks)
        train(train_task(tiny.recipe()), tiny_dataset, tmp_path / "small", ranks)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, ranks.device)
