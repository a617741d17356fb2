"""The fused kernels of stream and heads on a CUDA device, against their plain twins in float64."""

import pytest

torch = pytest.importorskip("torch")

from trainer.kernels.heads import turn_heads  # noqa: E402
from trainer.kernels.stream import add_norm, mix_norm  # noqa: E402
from trainer.model.rotary import Rotary  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
FACTOR = 0.7


# The function and its arguments: s a stream, d a vector, m two of them.
CASES = {
    "mix_norm": (mix_norm, "ssm"),
    "add_norm": (add_norm, "ssd"),
}
SHAPES = [(3, 130, 96), (2, 2048, 512), (1, 33, 768), (1, 65, 1024), (1, 9, 2048)]
# B, T, H, E and the dims that turn.
HEADS = [(2, 2048, 8, 64, 16), (3, 130, 4, 64, 64), (1, 67, 3, 20, 6), (2, 33, 12, 128, 32)]
cases = pytest.mark.parametrize("case", CASES)
gains = pytest.mark.parametrize("has_gain", [False, True], ids=["no gain", "gain"])
modes = pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
dtypes = pytest.mark.parametrize(
    ("dtype", "close"), [(torch.bfloat16, 1e-2), (torch.float32, 2e-5)], ids=["bf16", "fp32"]
)


def draw(shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to("cuda", dtype)


def compiled(function):
    torch.compiler.reset()  # the code object is that of the case before
    return torch.compile(function, fullgraph=True, dynamic=False)


def stream_arguments(kinds, shape, dtype):
    own = {"s": shape, "d": shape[-1:], "m": (2, shape[-1])}
    return [
        draw(own[kind], seed, dtype if kind == "s" else torch.float32)
        for seed, kind in enumerate(kinds)
    ]


def head_arguments(shape, has_gain, dtype):
    *sizes, dims = shape
    cos, sin = Rotary(dims, 10_000.0)(sizes[1], torch.device("cuda"))
    gain = draw(sizes[2:3], 1) if has_gain else None
    return draw(sizes, 0, dtype), gain, cos, sin


def with_gradients(function, inputs, leaves=None):
    """The outputs and the gradients of the first `leaves` inputs, of a fixed weighting of all."""
    inputs = [None if one is None else one.detach() for one in inputs]
    leaves = [one.requires_grad_() for one in inputs[:leaves] if one is not None]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [draw(out.shape, 10 + index) for index, out in enumerate(outputs)]
    weights = [w.to(out.device, out.dtype) for w, out in zip(weights, outputs, strict=True)]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, weights)]


def twin(function, inputs, leaves=None):
    """The same on the CPU, where the operator is its plain twin, in float64."""
    wide = [None if one is None else one.detach().cpu().double() for one in inputs]
    return with_gradients(function, wide, leaves)


def assert_near(found, expected, close):
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        apart = float((ours.cpu().double() - theirs).norm() / theirs.norm())
        assert apart < close, (index, apart)


@cases
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@modes
@dtypes
def test_the_stream_is_what_its_plain_twin_says(case, shape, is_compiled, dtype, close):
    own, kinds = CASES[case]
    inputs = stream_arguments(kinds, shape, dtype)

    def function(*tensors):
        return own(*tensors, FACTOR)

    run = compiled(function) if is_compiled else function

    found = with_gradients(run, inputs)

    assert_near(found, twin(function, inputs), close)


@cases
@pytest.mark.parametrize("unused", [0, 1])
def test_an_output_that_nothing_uses_adds_nothing(case, unused):
    own, kinds = CASES[case]
    inputs = stream_arguments(kinds, (3, 130, 96), torch.float32)

    def function(*tensors):
        outputs = own(*tensors, FACTOR)
        return tuple(out for index, out in enumerate(outputs) if index != unused)

    assert_near(with_gradients(function, inputs), twin(function, inputs), 2e-5)


@gains
@pytest.mark.parametrize("shape", HEADS, ids=str)
@modes
@dtypes
def test_heads_are_turned_as_their_plain_twin_says(has_gain, shape, is_compiled, dtype, close):
    inputs = head_arguments(shape, has_gain, dtype)
    run = compiled(turn_heads) if is_compiled else turn_heads

    found = with_gradients(run, inputs, leaves=2)

    assert_near(found, twin(turn_heads, inputs, leaves=2), close)


@cases
def test_streams_may_lie_in_memory_as_they_like(case):
    own, kinds = CASES[case]
    inputs = stream_arguments(kinds, (6, 130, 96), torch.float32)
    turned = [one.transpose(0, -1).contiguous().transpose(0, -1) for one in inputs]

    def function(*tensors):
        outputs = own(*tensors, FACTOR)
        # The gradient of a transposed output is not in order, that of a sum is expanded.
        return *(out.transpose(0, 1) for out in outputs), outputs[0].sum()

    assert_near(with_gradients(function, turned), twin(function, inputs), 2e-5)


def test_heads_may_lie_in_memory_as_they_like():
    x, *others = head_arguments((2, 130, 4, 64, 16), True, torch.float32)
    together = torch.cat((x, x, x), dim=2)

    def function(*given):
        return turn_heads(*given).transpose(1, 2).contiguous()

    expected = twin(function, (x, *others), leaves=2)

    for own in (
        together[:, :, 4:8],
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x.mT.contiguous().mT,
    ):
        assert_near(with_gradients(function, (own, *others), leaves=2), expected, 2e-5)


@cases
def test_two_runs_of_a_stream_give_the_same_bits(case):
    own, kinds = CASES[case]
    inputs = stream_arguments(kinds, (8, 2048, 512), torch.bfloat16)

    first, second = (
        with_gradients(lambda *tensors: own(*tensors, FACTOR), inputs) for _ in range(2)
    )

    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_two_runs_of_the_heads_give_the_same_bits():
    inputs = head_arguments((8, 2048, 8, 64, 16), True, torch.bfloat16)

    first, second = (with_gradients(turn_heads, inputs, leaves=2) for _ in range(2))

    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
