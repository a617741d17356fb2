"""The update as one CUDA graph, batches that are read ahead, and graphs built on the clock."""

import copy
import threading
from contextlib import closing
from dataclasses import replace

import pytest

from tests import tiny
from trainer.errors import BackendError, TrainingError
from trainer.model.build import build
from trainer.optim.groups import Optimizers
from trainer.run import train
from trainer.runtime.clock import Clock
from trainer.runtime.distributed import Ranks
from trainer.runtime.tensors import load_tensors
from trainer.specs import train as specs
from trainer.specs.recipe import Observe
from trainer.specs.task import train_task
from trainer.train import loop
from trainer.train.runner import StepRunner
from trainer.train.state import TrainState

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SPEC = specs.Optimizer(
    matrix=specs.Muon(weight_decay=0.05, momentum_warmup_steps=3),
    embed=specs.AdamW(lr=0.02, weight_decay=0.1),
    grad_clip=0.3,
)


@pytest.fixture
def ranks():
    return Ranks(device=torch.device("cuda", 0))


def begin(captured, dtype="bfloat16"):
    model = build(tiny.full_model(), seed=0, dtype=dtype).cuda()
    return model, Optimizers(model, SPEC, captured=captured)


def take_steps(model, optimizers, first, last):
    """Give every parameter a gradient of its step's own, and other rates in each."""
    for step in range(first, last):
        generator = torch.Generator("cuda").manual_seed(step)
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, device="cuda", generator=generator)
            parameter.grad = drawn.to(parameter.dtype)
        optimizers.step(step, 1.0 / (1 + step))


def assert_same(one, other):
    """The same bits: both are steps of one recorded update."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_recorded_update_moves_the_weights_as_the_plain_one_does(dtype):
    (plain, by_launch), (recorded, by_graph) = begin(False, dtype), begin(True, dtype)
    start = copy.deepcopy(plain.state_dict())

    take_steps(plain, by_launch, 0, 5)
    take_steps(recorded, by_graph, 0, 5)

    for name, found in recorded.state_dict().items():
        expected = plain.state_dict()[name]
        assert not torch.equal(found, start[name]), name
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=2e-4, msg=name)


def test_a_recorded_update_leaves_no_gradient_and_the_state_of_a_plain_one():
    states = []
    for captured in (False, True):
        model, optimizers = begin(captured)
        take_steps(model, optimizers, 0, 3)
        assert all(parameter.grad is None for parameter in model.parameters())
        states.append(optimizers.state_dict())

    plain, found = states
    for role in plain:
        assert plain[role]["param_groups"] == found[role]["param_groups"]
        for i, tensors in plain[role]["state"].items():
            assert list(tensors) == list(found[role]["state"][i])


def test_a_recorded_update_goes_on_from_a_state_that_is_put_back():
    (straight, ahead), (rolled, back) = begin(True), begin(True)
    fresh = copy.deepcopy((rolled.state_dict(), back.state_dict()))
    take_steps(rolled, back, 20, 23)
    rolled.load_state_dict(fresh[0])
    back.load_state_dict(fresh[1])
    take_steps(rolled, back, 0, 3)
    saved = copy.deepcopy((rolled.state_dict(), back.state_dict()))
    take_steps(rolled, back, 30, 32)
    rolled.load_state_dict(saved[0])
    back.load_state_dict(saved[1])

    take_steps(rolled, back, 3, 6)
    take_steps(straight, ahead, 0, 6)

    assert_same(straight, rolled)


def test_another_process_goes_on_from_it_to_the_same_bits():
    (straight, ahead), (first, before) = begin(True), begin(True)
    take_steps(straight, ahead, 0, 6)
    take_steps(first, before, 0, 3)
    resumed, after = begin(True)

    resumed.load_state_dict(first.state_dict())
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    take_steps(resumed, after, 3, 6)

    assert_same(straight, resumed)


def test_a_parameter_that_has_no_gradient_for_once_is_left_as_the_plain_update_leaves_it():
    ends = []
    for captured in (False, True):
        model, optimizers = begin(captured)
        take_steps(model, optimizers, 0, 2)
        before = model.embedding.weight.detach().clone()
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1)
        model.embedding.weight.grad = None
        optimizers.step(2, 1.0)
        assert torch.equal(model.embedding.weight, before)
        take_steps(model, optimizers, 3, 5)
        ends.append(model)

    for one, other in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=2e-4)


def compiled_task(**values):
    values = {f"train.{name}": value for name, value in values.items()}
    return train_task(tiny.recipe({"train.compile": True, **values}))


@pytest.mark.parametrize("warmup_steps", [0, 2])
def test_a_resumed_training_ends_where_one_without_a_break_does(
    tiny_dataset, tmp_path, ranks, warmup_steps
):
    task = replace(compiled_task(warmup_steps=warmup_steps), observe=Observe(checkpoint_every=7))
    straight = loop.train(task, tiny_dataset, tmp_path, ranks)
    whole = {name: load_tensors(tmp_path / "bank", name) for name in straight.entries}

    resumed = loop.train(task, tiny_dataset, tmp_path, ranks)  # from the checkpoint that it left

    assert (straight.steps_computed, resumed.steps_computed) == (12, 5)
    for entry, tensors in whole.items():
        found = load_tensors(tmp_path / "bank", entry)
        for name, tensor in tensors.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-3, msg=name)


def test_a_graph_that_is_built_on_the_clock_fails_the_training(
    tiny_dataset, tmp_path, ranks, monkeypatch
):
    micros = StepRunner._micros

    def shortened(self, step):
        whole = micros(self, step)
        return tuple(rows[:, :-8] for rows in whole) if step == 4 else whole

    monkeypatch.setattr(StepRunner, "_micros", shortened)

    with pytest.raises(TrainingError, match=r"at step 4 .*warmup_steps, now 2"):
        train(compiled_task(warmup_steps=2), tiny_dataset, tmp_path, ranks)


@pytest.mark.parametrize("order", ["sequential", "shuffled"])
def test_rows_read_ahead_are_the_loaders(tiny_dataset, ranks, order):
    task = train_task(tiny.recipe({"train.order": order, "train.micro_batch_tokens": 64}))
    runner = StepRunner(task, tiny_dataset, TrainState(task, ranks, Clock()), ranks)

    steps = (0, 1, 2, 7, 8, 0)
    with closing(runner):
        torch.cuda._sleep(
            1_000_000_000
        )  # cycles that the copies wait behind, while reading goes on
        taken = [torch.cat(runner._micros(step)) for step in steps]
        for step, rows in zip(steps, taken, strict=True):
            assert rows.is_cuda
            assert rows.tolist() == runner.loader.rows(step).tolist()


def test_no_thread_is_left_behind_by_a_training_or_by_one_that_fails(tiny_dataset, tmp_path, ranks):
    def fail(step, val_bpb=None):
        raise BackendError("interrupted")

    train(train_task(tiny.recipe()), tiny_dataset, tmp_path / "whole", ranks)
    with pytest.raises(BackendError, match="interrupted"):
        train(train_task(tiny.recipe()), tiny_dataset, tmp_path / "broken", ranks, steer=fail)

    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
