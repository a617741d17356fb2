"""The fused residual stream: the model's own operations, their gradients, and nothing else."""

import pytest
import torch
from torch.nn import functional as F

from tests.interpreted import interpret, needs_triton
from trainer.kernels.stream import add_norm, mix_norm, plain_backward, plain_forward

FACTOR = 0.7
SHAPES = [(2, 5, 64), (3, 7, 96), (1, 1, 33)]


def drawn(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def normed(entry):
    return F.rms_norm(entry, (entry.shape[-1],)) * FACTOR


def plain_mix_norm(x, x0, mix, factor):
    entry = mix[0] * x + mix[1] * x0
    return entry, F.rms_norm(entry, (x.shape[-1],)) * factor


def plain_add_norm(x, branch, scale, factor):
    out = x + scale * branch
    return out, F.rms_norm(out, (x.shape[-1],)) * factor


# The function, what it stands for, and its arguments: s a stream, d a vector, m two of them.
CASES = {
    "mix_norm": (mix_norm, plain_mix_norm, "ssm"),
    "add_norm": (add_norm, plain_add_norm, "ssd"),
}
cases = pytest.mark.parametrize("case", CASES)


def arguments(kinds, shape, dtype=torch.float64):
    own = {"s": shape, "d": shape[-1:], "m": (2, shape[-1])}
    wide = torch.promote_types(dtype, torch.float32)
    tensors = drawn(*(own[kind] for kind in kinds))
    return [
        tensor.detach().to(dtype if kind == "s" else wide).requires_grad_()
        for tensor, kind in zip(tensors, kinds, strict=True)
    ]


def weighted(outputs, used=(0, 1)):
    """A scalar that every output named by `used` moves differently at every place."""
    return sum(
        (out.double() * torch.sin(torch.arange(out.numel()).view(out.shape) + index)).sum()
        for index, out in enumerate(outputs)
        if index in used
    )


def values_and_gradients(function, inputs, used=(0, 1)):
    outputs = function(*inputs, FACTOR)
    return outputs, torch.autograd.grad(weighted(outputs, used), inputs)


@cases
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_a_fused_function_is_the_models_operations_in_one(case, shape, dtype, close):
    function, plain, kinds = CASES[case]
    inputs = arguments(kinds, shape, dtype)

    outputs, gradients = values_and_gradients(function, inputs)

    expected, expected_gradients = values_and_gradients(plain, inputs)
    torch.testing.assert_close(outputs, expected, rtol=close, atol=close)
    torch.testing.assert_close(gradients, expected_gradients, rtol=close, atol=10 * close)


@cases
def test_its_derivative_is_that_of_finite_differences(case):
    function, _, kinds = CASES[case]

    assert torch.autograd.gradcheck(
        lambda *inputs: function(*inputs, FACTOR), arguments(kinds, (2, 2, 6))
    )


@cases
@pytest.mark.parametrize("unused", [0, 1])
def test_an_output_that_nothing_uses_adds_nothing(case, unused):
    function, plain, kinds = CASES[case]
    inputs = arguments(kinds, (2, 3, 24))
    used = {0, 1} - {unused}

    _, gradients = values_and_gradients(function, inputs, used)

    torch.testing.assert_close(gradients, values_and_gradients(plain, inputs, used)[1])


@cases
def test_a_bfloat16_stream_is_computed_in_float32_and_rounded_once(case):
    function, plain, kinds = CASES[case]
    inputs = arguments(kinds, (2, 9, 64), torch.bfloat16)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]

    outputs, gradients = values_and_gradients(function, inputs)

    expected, expected_gradients = values_and_gradients(plain, wide)
    assert all(out.dtype == torch.bfloat16 for out in outputs)
    for ours, theirs in zip((*outputs, *gradients), (*expected, *expected_gradients), strict=True):
        assert (ours.double() - theirs).norm() < 6e-3 * theirs.norm()
    for kind, tensor, gradient in zip(kinds, inputs, gradients, strict=True):
        assert gradient.dtype == tensor.dtype, kind


def test_the_norm_is_that_of_the_entry_as_it_is_kept():
    x, x0, mix = arguments("ssm", (2, 9, 64), torch.bfloat16)

    entry, ours = mix_norm(x, x0, mix, 1.0)

    expected = F.rms_norm(entry.float(), (64,)).bfloat16()
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_stream_near_zero_is_normed_with_the_epsilon_that_torch_takes(dtype):
    x, branch, scale = arguments("ssd", (2, 9, 64), dtype)

    out, ours = add_norm(x * 2e-4, branch * 2e-4, scale, FACTOR)

    assert 0.1 < ours.norm() / normed(out * 1e6).norm() < 0.9
    torch.testing.assert_close(
        ours, normed(out), rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=0
    )


@cases
def test_it_compiles_as_one_graph_with_the_same_gradients(case):
    function, _, kinds = CASES[case]
    inputs = arguments(kinds, (2, 5, 40), torch.float32)

    def step(*tensors):
        out, ours = function(*tensors, FACTOR)
        return out.sin(), ours.square()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")

    found = torch.autograd.grad(sum(out.sum() for out in compiled(*inputs)), inputs)

    expected = torch.autograd.grad(sum(out.sum() for out in step(*inputs)), inputs)
    torch.testing.assert_close(found, expected)


@cases
def test_tensors_may_lie_in_memory_as_they_like(case):
    function, _, kinds = CASES[case]
    inputs = arguments(kinds, (4, 6, 16), torch.float32)
    turned = [
        tensor.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
        for tensor in inputs
    ]

    def ends(tensors):
        outputs = function(*tensors, FACTOR)
        # Sums hand back a gradient that is expanded, a transposed product one that is not in order.
        return outputs, torch.autograd.grad(
            outputs[0].sum() + weighted([out.transpose(0, 1) for out in outputs]), tensors
        )

    torch.testing.assert_close(ends(turned), ends(inputs))


@cases
def test_an_operator_keeps_the_rules_of_the_dispatcher(case):
    given = arguments(CASES[case][2], (2, 3, 8), torch.float32)

    torch.library.opcheck(torch.ops.fairway.norm_stream.default, (*given, FACTOR))


def test_streams_of_two_shapes_are_refused():
    x, x0, mix = drawn((2, 3, 8), (2, 1, 8), (2, 8))

    with pytest.raises(ValueError, match=r"z is \(2, 1, 8\), x is \(2, 3, 8\)"):
        mix_norm(x, x0, mix, 1.0)


def compare_interpreted():
    """The kernels themselves, where Triton's interpreter runs them: see the test below."""
    from trainer.kernels.stream_triton import triton_backward, triton_forward

    close = {"rtol": 1e-4, "atol": 1e-4}
    for shape in ((3, 7, 96), (2, 5, 128), (1, 30, 513), (1, 70, 32)):
        for case, (_, _, kinds) in CASES.items():
            given = [tensor.detach() for tensor in arguments(kinds, shape, torch.float32)]
            found, expected = (run(*given, FACTOR) for run in (triton_forward, plain_forward))
            torch.testing.assert_close(found, expected, **close)
            out, _, rstd = expected
            x, z, weight = given
            saved = x if case == "mix_norm" else out, z, weight, rstd
            for used in ((1, 1), (0, 1), (1, 0)):
                grads = tuple(
                    drawn(shape, dtype=torch.float32, seed=seed)[0].detach() if use else None
                    for seed, use in enumerate(used, 1)
                )
                found, expected = (
                    run(grads, *saved, FACTOR) for run in (triton_backward, plain_backward)
                )
                torch.testing.assert_close(found, expected, **close)


@needs_triton
def test_the_triton_kernels_interpreted_say_what_the_plain_twin_says():
    interpret("from tests.unit import test_kernels_stream as cases; cases.compare_interpreted()")
