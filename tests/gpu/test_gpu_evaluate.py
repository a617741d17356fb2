"""Sliding evaluation on a CUDA device in bfloat16: compiled, launched ahead, kept in a journal."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

from torch._dynamo.utils import counters  # noqa: E402

from tests import tiny  # noqa: E402
from trainer.evaluate.journal import Journal, identity  # noqa: E402
from trainer.evaluate.sliding import slide  # noqa: E402
from trainer.evaluate.tape import Tape  # noqa: E402
from trainer.kernels.attention import lacking  # noqa: E402
from trainer.kernels.chosen import kernels_of_score  # noqa: E402
from trainer.model.build import build  # noqa: E402
from trainer.runtime.distributed import Ranks  # noqa: E402
from trainer.specs.evaluate import Documents, EvaluateSpec  # noqa: E402
from trainer.specs.kernels import AttentionKernel  # noqa: E402
from trainer.specs.model import Attention, QGain, Rope  # noqa: E402

CUDA = torch.device("cuda", 0)
FLAT = EvaluateSpec(window=256, stride=32, batch_windows=16)
SPECS = {"flat": FLAT, "documents": replace(FLAT, documents=Documents(bos=1))}


def model_of(name="torch", *, fused=False):
    heads = Attention(num_heads=4, num_kv_heads=2, rope=Rope(dims=16), q_gain=QGain())
    chosen = replace(FLAT, attention=AttentionKernel(name=name), fused=fused)
    kernels = kernels_of_score(chosen, CUDA, "bfloat16")
    spec = tiny.full_model(dim=256, vocab_size=1024, attention=heads)
    built = build(spec, seed=0, dtype="bfloat16", kernels=kernels)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return built.to(CUDA)


def text(num_predictions=20_000):
    tokens = np.random.default_rng(0).integers(2, 1024, size=num_predictions + 1)
    tokens[::900] = 1
    return tokens.astype(np.uint16)


def scored(model, spec, device=CUDA, **parts):
    tape = Tape(text(), **parts)
    slide(model, tape, spec, Ranks(device=device))
    return tape


def mean_gap(found, other):
    """Nats per prediction that two scores of a text lie apart."""
    return abs(float(np.mean(found.losses - other.losses, dtype=np.float64)))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("kernel", ["torch", "cudnn", "flash", "flash_attn_4"])
@pytest.mark.parametrize("name", SPECS)
def test_compiled_scores_are_the_eager_ones_rounded_less_often(name, kernel, fused):
    if why := lacking(kernel, CUDA, "bfloat16"):
        pytest.skip(why)
    model, spec = model_of(kernel, fused=fused), SPECS[name]
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    exact = build(model.plan.spec)
    exact.load_state_dict(state)

    found = scored(model, replace(spec, compile=True))

    assert mean_gap(found, scored(exact.to(CUDA), spec)) < 1.5e-4
    plain = scored(model, spec)
    assert mean_gap(found, plain) < 1e-3
    assert np.abs(found.losses - plain.losses).max() < 0.1
    assert (found.times == 1).all()


def test_a_whole_evaluation_builds_one_graph():
    torch._dynamo.reset()
    counters.clear()
    model, spec = model_of(), replace(FLAT, compile=True)

    first, second = (scored(model, spec) for _ in range(2))

    assert counters["stats"]["unique_graphs"] == 1
    assert first.losses.tobytes() == second.losses.tobytes()


def test_scores_that_are_fetched_late_are_those_of_the_host():
    model = model_of()

    found = scored(model, FLAT)

    plain = scored(model.cpu(), replace(FLAT, batch_windows=3), device=torch.device("cpu"))
    assert found.losses.mean() == pytest.approx(plain.losses.mean(), abs=2e-3)
    assert np.abs(found.losses - plain.losses).max() < 0.2


def test_an_evaluation_that_broke_off_goes_on_to_the_same_scores(tmp_path):
    class Stop:
        def resumed(self, predictions):
            pass

        left = 9000

        def advance(self, predictions):
            self.left -= predictions
            if self.left < 0:
                raise KeyboardInterrupt

    model, spec, name = model_of(), replace(FLAT, compile=True), identity("this score")
    whole = scored(model, spec)
    with pytest.raises(KeyboardInterrupt):
        scored(model, spec, progress=Stop(), journal=Journal(tmp_path, name, every_s=0.0))

    tape = scored(model, spec, journal=Journal(tmp_path, name))

    assert tape.losses.tobytes() == whole.losses.tobytes()
    assert (tape.events, tape.digest()) == (whole.events, whole.digest())
