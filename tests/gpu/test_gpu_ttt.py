"""Test-time training on a CUDA device, in bfloat16."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

from tests import tiny  # noqa: E402
from trainer.evaluate.evaluators import evaluate  # noqa: E402
from trainer.evaluate.tape import Tape  # noqa: E402
from trainer.model.build import build  # noqa: E402
from trainer.runtime.distributed import Ranks  # noqa: E402
from trainer.specs.evaluate import Documents, EvaluateSpec  # noqa: E402
from trainer.specs.model import Recurrence  # noqa: E402
from trainer.specs.ttt import LoraTtt, OracleTtt, Phases, SgdTtt  # noqa: E402

STREAM = EvaluateSpec(window=64, stride=32)
APART = EvaluateSpec(window=64, stride=16, documents=Documents(bos=1))
LORA = LoraTtt(rank=8, alpha=16.0, lr=0.003, weight_decay=0.0, batch_documents=8)
PHASES = Phases(documents=8, count=2, chunk_tokens=256, lr=0.05)
SPECS = {
    "sgd": replace(STREAM, ttt=SgdTtt(chunk_tokens=128, lr=0.05)),
    "lora": replace(APART, ttt=LORA),
    "phased": replace(APART, ttt=replace(LORA, batch_documents=2, phases=PHASES)),
    "oracle": replace(STREAM, ttt=OracleTtt(epochs=5, lr=0.003)),
}


@pytest.fixture(scope="module")
def model():
    spec = tiny.full_model(dim=64, recurrence=Recurrence(first=1, last=1))
    built = build(spec, seed=0, dtype="bfloat16")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return built.cuda()


def text():
    """Write documents that repeat a few phrases."""
    generator = np.random.default_rng(0)
    phrases = generator.integers(2, 64, size=(4, 8))
    documents = [
        np.concatenate([[1], phrases[generator.integers(4, size=int(n))].ravel()])
        for n in generator.integers(4, 20, size=24)
    ]
    return np.concatenate(documents).astype(np.uint16)


def scored(model, spec):
    tape = Tape(text())
    evaluate(deepcopy(model), tape, spec, Ranks(device=torch.device("cuda")))
    return tape


@pytest.mark.parametrize("name", SPECS)
def test_it_lowers_the_loss_and_scores_everything_once(model, name):
    spec = SPECS[name]

    tape = scored(model, spec)

    base = scored(model, replace(spec, ttt=None))
    assert (tape.times == 1).all()
    assert tape.losses.mean() < base.losses.mean() - 0.05


@pytest.mark.parametrize("name", SPECS)
def test_a_rate_of_zero_gives_the_plain_score(model, name):
    spec = SPECS[name]
    still = {"lr": 0.0}
    if name == "phased":
        still["phases"] = replace(PHASES, lr=0.0)

    found = scored(model, replace(spec, ttt=replace(spec.ttt, **still)))

    plain = scored(model, replace(spec, ttt=None))
    assert found.losses.mean() == pytest.approx(plain.losses.mean(), abs=2e-3)
