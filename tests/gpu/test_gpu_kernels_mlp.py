"""The kernels of the loss and of the MLP, against plain formulas in float64."""

from functools import partial

import pytest

torch = pytest.importorskip("torch")
from torch.nn import functional as F  # noqa: E402

from trainer.kernels.loss import capped_loss  # noqa: E402
from trainer.kernels.mlp import relu2_mlp  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LOGITS = [(3, 65, 17), (2, 300, 1000), (48, 2048, 1024), (1, 9, 16_384), (1, 5, 20_000)]
MLPS = [((65, 20), 33), ((2, 129, 72), 264), ((1, 512), 1536), ((48, 2048, 512), 1536)]
SLOPES = [0.0, 0.5]
RUNS = pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])


def draw(shape, seed, scale=1.0, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, device="cuda", dtype=dtype)


def matrices(shape, width):
    dim = shape[-1]
    up, down = draw((width, dim), 2, dim**-0.5), draw((dim, width), 3, width**-0.5)
    return draw(shape, 1), up, down


def plain_loss(logits, targets, cap):
    z = logits if cap is None else cap * torch.tanh(logits / cap)
    return z.logsumexp(-1) - z.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def plain_mlp(x, up, down, slope):
    return F.linear(F.leaky_relu(F.linear(x, up), slope).square(), down)


def with_gradients(function, *inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    weight = torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out).bfloat16()
    return [out.detach(), *torch.autograd.grad(out, inputs, weight.to(out.dtype))]


def whole(function, is_compiled):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False) if is_compiled else function


def apart(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def targets_of(shape):
    generator = torch.Generator("cuda").manual_seed(7)
    return torch.randint(shape[-1], shape[:-1], generator=generator, device="cuda")


@RUNS
@pytest.mark.parametrize("cap", [None, 15.0])
@pytest.mark.parametrize("shape", LOGITS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)], ids=str
)
def test_a_loss_is_the_plain_one(dtype, tolerance, shape, cap, is_compiled):
    logits, targets = draw(shape, 1, 4.0, dtype), targets_of(shape)
    function = whole(lambda x: capped_loss(x, targets, cap), is_compiled)

    found = with_gradients(function, logits)

    expected = with_gradients(lambda x: plain_loss(x, targets, cap), logits.double())
    assert [x.dtype for x in found] == [torch.float32, dtype]
    for ours, theirs in zip(found, expected, strict=True):
        assert apart(ours, theirs) < tolerance


def test_a_loss_and_its_gradient_have_no_wide_logits():
    logits, targets = draw((8, 2048, 1024), 1).requires_grad_(), targets_of((8, 2048, 1024))
    size = logits.numel() * logits.itemsize

    def peak(step):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result

    forward, loss = peak(lambda: capped_loss(logits, targets, 15.0).mean())
    backward, _ = peak(loss.backward)

    assert forward < 0.05 * size
    assert backward < 1.05 * size


def test_a_target_outside_the_vocabulary_gives_no_number():
    targets = torch.tensor([0, 8, -100], device="cuda")

    losses = capped_loss(draw((3, 8), 1), targets, 15.0)

    assert losses.isnan().tolist() == [False, True, True]


@RUNS
@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize(("shape", "width"), MLPS, ids=str)
def test_an_mlp_is_the_plain_one(shape, width, slope, is_compiled):
    inputs = matrices(shape, width)
    function = whole(lambda *given: relu2_mlp(*given, slope), is_compiled)

    found = with_gradients(function, *inputs)

    wide = [x.double() for x in inputs]
    expected = with_gradients(lambda *given: plain_mlp(*given, slope), *wide)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert apart(ours, theirs) < 1e-2


@pytest.mark.parametrize("slope", SLOPES)
def test_a_hopper_device_takes_the_kernel_both_ways(slope, monkeypatch):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("compute capability is not 9")
    from trainer.kernels import mlp_triton

    taken = []

    def spied(name, kernel, *given):
        taken.append(name)
        return kernel(*given)

    for name in ("project_up", "project_back"):
        spy = partial(spied, name, getattr(mlp_triton, name))
        monkeypatch.setattr(mlp_triton, name, spy)

    with_gradients(lambda *given: relu2_mlp(*given, slope), *matrices((300, 512), 1536))

    assert taken == ["project_up", "project_back"]


def test_products_of_many_lengths_are_measured_for_a_few():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("compute capability is not 9")
    from trainer.kernels.mlp_triton import _project

    measured = len(_project.cache)
    for length in range(80, 1000, 23):
        relu2_mlp(*matrices((length, 72), 264), 0.0)

    assert 1 <= len(_project.cache) - measured <= 3


@pytest.mark.parametrize("slope", SLOPES)
def test_two_runs_give_the_same_bits(slope):
    inputs = matrices((4096, 512), 1536)
    logits, targets = draw((4096, 1024), 5), targets_of((4096, 1024))

    def run():
        y = with_gradients(lambda *given: relu2_mlp(*given, slope), *inputs)
        return y + with_gradients(lambda x: capped_loss(x, targets, 15.0), logits)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_a_slice_that_starts_between_two_loads_is_taken():
    _, up, down = matrices((1, 512), 1536)
    x = draw((1 + 300 * 512,), 1)[1:].view(300, 512)

    found = with_gradients(lambda up, down: relu2_mlp(x, up, down, 0.0), up, down)

    wide = up.double(), down.double()
    expected = with_gradients(lambda *given: plain_mlp(x.double(), *given, 0.0), *wide)
    for ours, theirs in zip(found, expected, strict=True):
        assert apart(ours, theirs) < 1e-2
