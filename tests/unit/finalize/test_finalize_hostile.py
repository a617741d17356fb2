"""A thousand broken weights files: each is refused in one line, in bounded time and memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import hostile
from tests.forged import QUICK
from trainer.blueprint import blueprint
from trainer.finalize.artifact import write_weights
from trainer.finalize.quantize import quantize_tensors
from trainer.finalize.stored import Quantized
from trainer.quant import quantize_rows
from trainer.sizes import tensor_sizes
from trainer.specs.final import Lqer, Quantize
from trainer.specs.model import Attention, Mlp, ModelSpec, QGain, UNetSkips

ROOT = Path(hostile.__file__).parents[1]
MiB = 1 << 20
FIXED = 16 * MiB  # beside a process that has read good files: half of what a bomb holds


def write_good(folder):
    spec = ModelSpec(
        vocab_size=64,
        num_layers=3,
        dim=64,
        attention=Attention(num_heads=2, num_kv_heads=1, q_gain=QGain()),
        mlp=Mlp(mult=2.0),
        unet=UNetSkips(),
    )
    sizes = tensor_sizes(blueprint(spec))
    draw = torch.Generator().manual_seed(0)
    state = {size.name: torch.randn(size.shape, generator=draw) / 8 for size in sizes}
    quantize = Quantize(float_numel=2048, lqer=Lqer(tensors=2, rank=2))
    stored, _ = quantize_tensors(state, sizes, quantize)
    for kind, quick in QUICK.items():
        write_weights(folder / f"{kind}.fw", spec, stored, quick, "ab" * 32)


def write_large(folder):
    """One matrix is nearly all; where all is zero, few bytes stand for 41 MB."""
    spec = ModelSpec(vocab_size=2**14, num_layers=1, dim=512)
    for name, draw in (("zeros", torch.zeros), ("noise", torch.randn)):
        stored = {}
        for size in tensor_sizes(blueprint(spec)):
            weight, scale = draw(size.shape), torch.ones(size.shape[0]).half()
            stored[size.name] = Quantized(quantize_rows(weight, scale, 6), scale, 6)
        for kind, quick in QUICK.items():
            write_weights(folder / f"{kind}.{name}.big", spec, stored, quick, "ab" * 32)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What a process apart found in all of the files."""
    folder = tmp_path_factory.mktemp("hostile")
    write_good(folder)
    write_large(folder)
    count = hostile.write_mutants(folder)
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile", folder],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout) | {"count": count}


def test_a_thousand_mutants_never_crash_hang_or_take_memory(report):
    assert report["faults"] == []
    assert report["count"] >= 1000
    assert 0.8 * report["count"] < report["refused"] < report["count"]
    assert report["seconds"] < 2.0
    assert report["bytes"] < FIXED


@pytest.mark.parametrize("held", ["zeros", "noise"])
@pytest.mark.parametrize("kind", QUICK)
def test_a_large_file_takes_less_than_twice_what_it_holds(report, kind, held):
    taken, honest = report["large"][f"{kind}.{held}.big"]

    assert honest > 32 * MiB
    assert taken < 2 * honest + FIXED // 2
