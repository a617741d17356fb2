"""Gangs of two processes: the same scores as one, however raggedly they share the work."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests import tiny
from tests.models import off_its_start
from trainer.evaluate.evaluators import evaluate
from trainer.evaluate.journal import Journal
from trainer.evaluate.tape import Tape
from trainer.model.build import build
from trainer.runtime.distributed import Ranks, current
from trainer.specs.evaluate import Documents, EvaluateSpec
from trainer.specs.ttt import LoraTtt, OracleTtt, Phases, SgdTtt

ROOT = Path(__file__).resolve().parents[2]
WORLD_SIZE, TIMEOUT_S = 2, 480

STREAM = EvaluateSpec(window=16, stride=8)
APART = replace(STREAM, documents=Documents(bos=1))
# A small eps would make a whole step of the sign of a gradient that is rounding alone.
COLD = LoraTtt(rank=2, lr=0.003, warm_a=False, batch_documents=2, eps=1e-2)
PHASES = Phases(documents=5, count=2, chunk_tokens=48, lr=0.05)
SPECS = {
    "sliding": STREAM,
    "documents": APART,
    "sgd": replace(STREAM, ttt=SgdTtt(chunk_tokens=48, lr=0.05)),
    # One sequence to train on: the second rank has none.
    "sgd-lone": replace(STREAM, ttt=SgdTtt(chunk_tokens=20, lr=0.05)),
    "lora": replace(APART, ttt=COLD),
    "phased": replace(APART, ttt=replace(COLD, phases=PHASES)),
    "oracle-adamw": replace(STREAM, ttt=OracleTtt(epochs=2)),
    "oracle-sgd": replace(STREAM, ttt=OracleTtt(optimizer="sgd", epochs=2, lr=0.05)),
}
RESUMED = {"sgd": 2, "phased": 2}
"""What is killed and resumed, and after how many lends."""


def model_of():
    return off_its_start(build(tiny.full_model(), seed=0))


def text():
    tokens = np.random.default_rng(2).integers(2, 64, size=201)
    tokens[[0, 30, 37, 80, 99, 140, 151, 190]] = 1
    return tokens.astype(np.uint16)


class Killed(Exception):
    pass


class Mortal(Tape):
    """A tape that dies when it is asked for tokens too often: on all ranks at the same place."""

    def __init__(self, most_lends, journal):
        super().__init__(text(), journal=journal)
        self.left = most_lends

    def lend(self, first, stop):
        if not self.left:
            raise Killed
        self.left -= 1
        return super().lend(first, stop)


class Count:
    """A listener that knows what it did not have to score."""

    num_resumed = 0

    def resumed(self, predictions):
        self.num_resumed = predictions

    def advance(self, predictions):
        pass


def score(name, ranks):
    tape = Tape(text())
    evaluate(model_of(), tape, SPECS[name], ranks)
    return tape


def score_twice(name, ranks, folder):
    """Die on the way, and score again with what the journal holds."""
    mortal = Mortal(RESUMED[name], Journal(folder / name, name, ranks.rank, every_s=0.0))
    with pytest.raises(Killed):
        evaluate(model_of(), mortal, SPECS[name], ranks)
    ranks.barrier()
    told = Count()
    tape = Tape(text(), progress=told, journal=Journal(folder / name, name, ranks.rank))
    evaluate(model_of(), tape, SPECS[name], ranks)
    assert (told.num_resumed > 0) == ranks.is_first
    return tape


def work(rank, folder):
    """Score everything in a process of the gang, and leave the losses in a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD_SIZE
    )
    ranks = current(torch.device("cpu"))
    found = {name: score(name, ranks) for name in SPECS}
    found |= {f"{name}-resumed": score_twice(name, ranks, folder) for name in RESUMED}
    np.savez(
        folder / f"{rank}.npz",
        **{name: tape.losses for name, tape in found.items()},
        times=np.stack([tape.times for tape in found.values()]),
    )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def gang(tmp_path_factory):
    """Return the losses that each rank of a gang holds, by name."""
    folder = tmp_path_factory.mktemp("gang")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD_SIZE)
    ]
    said = [worker.communicate(timeout=TIMEOUT_S)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * WORLD_SIZE, said
    return [np.load(folder / f"{rank}.npz") for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("name", SPECS)
def test_two_ranks_score_as_one(gang, name):
    alone = score(name, Ranks()).losses

    for held in gang:
        assert held[name] == pytest.approx(alone, abs=1e-5)
        assert held[name].mean() == pytest.approx(alone.mean(), abs=1e-6)


@pytest.mark.parametrize("name", RESUMED)
def test_a_killed_gang_goes_on_as_if_it_had_not_been(gang, name):
    for held in gang:
        assert (held[f"{name}-resumed"] == held[name]).all()


def test_every_rank_holds_every_score_once(gang):
    for held in gang:
        assert (held["times"] == 1).all()


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
