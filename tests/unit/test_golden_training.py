"""Eight steps of the public pr414 script from its own weights, against its own numbers."""

import json

import numpy as np
import pytest
import torch

from tests import golden_pr414
from trainer.model.build import build, load_state
from trainer.optim.averages import AverageBank
from trainer.optim.groups import Optimizers
from trainer.optim.schedule import lr_scale, progress
from trainer.specs import train as specs

GOLDEN = json.loads((golden_pr414.FOLDER / "train_8_steps.json").read_text(encoding="utf-8"))
ROWS, LENGTH = GOLDEN["batch_seqs"], GOLDEN["seq_len"]


def adamw(lr):
    return specs.AdamW(lr=lr, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.04)


SPEC = specs.TrainSpec(
    iterations=GOLDEN["iterations"],
    batch_tokens=ROWS * LENGTH,
    seq_len=LENGTH,
    schedule=specs.Schedule(warmdown_iters=GOLDEN["warmdown"]),
    optimizer=specs.Optimizer(
        matrix=specs.Muon(
            lr=0.025,
            momentum=0.99,
            momentum_start=0.92,
            momentum_warmup_steps=1500,
            ns_dtype="bfloat16",  # as the script does it wherever it runs
            weight_decay=0.04,
        ),
        embed=adamw(0.035),
        scalar=adamw(0.025),
        grad_clip=0.3,
    ),
    averages=specs.Averages(ema_decay=0.997),
)


@pytest.fixture(scope="module")
def run():
    """Train as the loop does; return what each step saw, and the bank after the last."""
    tokens = torch.from_numpy(np.load(golden_pr414.FOLDER / "tokens.npy").astype(np.int64))
    model = build(golden_pr414.model_spec())
    load_state(model, golden_pr414.our_state())
    optimizers, bank = Optimizers(model, SPEC.optimizer), AverageBank(model, SPEC.averages)
    taken, seen = ROWS * LENGTH + 1, []
    for step in range(SPEC.iterations):
        chunk = tokens[step * taken : (step + 1) * taken]
        scale = lr_scale(SPEC, step, 0.0)
        loss = model(chunk[:-1].view(ROWS, LENGTH), chunk[1:].view(ROWS, LENGTH)).mean()
        loss.backward()
        norms = torch.stack([parameter.grad.norm() for parameter in model.parameters()])
        optimizers.step(step, scale)
        momentum = optimizers.by_role["matrix"].param_groups[0]["momentum"]
        bank.update(step + 1, scale, progress(SPEC, step, 0.0))
        seen.append((loss.item(), norms.norm().item(), scale, momentum))
    return seen, bank.entries()


def golden(series):
    return [step[series] for step in GOLDEN["steps"]]


def test_losses_are_the_scripts(run):
    assert [loss for loss, *_ in run[0]] == pytest.approx(golden("loss"), abs=2e-3)


def test_gradient_norms_are_the_scripts(run):
    assert [norm for _, norm, *_ in run[0]] == pytest.approx(golden("grad_norm"), rel=1e-3)


def test_rates_and_momenta_are_the_scripts(run):
    assert [scale for *_, scale, _ in run[0]] == pytest.approx(golden("lr_scale"))
    assert [momentum for *_, momentum in run[0]] == pytest.approx(golden("momentum"))


@pytest.mark.parametrize(("entry", "series"), [("raw", "param_norms"), ("ema-0.997", "ema_norms")])
def test_every_parameter_ends_with_the_scripts_norm(run, entry, series):
    names, state = golden_pr414.our_names(), run[1][entry]

    norms = {theirs: state[names[theirs]].norm().item() for theirs in GOLDEN[series]}

    assert len(norms) == len(state) == 61
    assert norms == pytest.approx(GOLDEN[series], rel=1e-3)
