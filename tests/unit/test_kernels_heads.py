"""Norm, rotation and gain of the heads in one: the model's own operations and their gradients."""

import pytest
import torch

from tests.interpreted import interpret, needs_triton
from trainer.kernels.heads import plain_backward, plain_forward, turn_heads
from trainer.model.linear import norm
from trainer.model.rotary import Rotary, rotate

# B, T, H, E and the dims that turn.
SHAPES = [(2, 5, 8, 64, 16), (1, 7, 3, 64, 64), (2, 3, 6, 20, 6), (1, 4, 1, 7, 2)]
shapes = pytest.mark.parametrize("shape", SHAPES)
gains = pytest.mark.parametrize("has_gain", [False, True], ids=["no gain", "gain"])


def drawn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def arguments(shape, has_gain, dtype=torch.float64):
    """x and the gain as leaves, cos and sin as the model makes them."""
    *sizes, dims = shape
    wide = torch.promote_types(dtype, torch.float32)
    x = drawn(*sizes, dtype=dtype).requires_grad_()
    gain = drawn(sizes[2], seed=1, dtype=wide).requires_grad_() if has_gain else None
    tables = Rotary(dims, 10_000.0)(sizes[1], torch.device("cpu"))
    return x, gain, *(table.to(wide) for table in tables)


def plain(x, gain, cos, sin):
    out = rotate(norm(x), (cos, sin))
    return out if gain is None else out * gain[:, None]


def value_and_gradients(function, x, gain, cos, sin):
    out = function(x, gain, cos, sin)
    leaves = [leaf for leaf in (x, gain) if leaf is not None]
    d_out = drawn(*out.shape, seed=2, dtype=out.dtype)
    return out, *torch.autograd.grad(out, leaves, d_out)


@shapes
@gains
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_heads_are_normed_turned_and_scaled_as_by_the_model(shape, has_gain, dtype, close):
    given = arguments(shape, has_gain, dtype)

    found = value_and_gradients(turn_heads, *given)

    expected = value_and_gradients(plain, *given)
    torch.testing.assert_close(found, expected, rtol=close, atol=10 * close)


@shapes
@gains
def test_its_derivative_is_that_of_finite_differences(shape, has_gain):
    assert torch.autograd.gradcheck(
        turn_heads, arguments((1, *shape[1:]), has_gain), fast_mode=True
    )


@gains
def test_bfloat16_heads_are_computed_in_float32_and_rounded_once(has_gain):
    x, gain, cos, sin = arguments((2, 9, 8, 64, 16), has_gain, torch.bfloat16)
    wide = [None if one is None else one.detach().double() for one in (x, gain, cos, sin)]
    for leaf in wide[: 1 + has_gain]:
        leaf.requires_grad_()

    found = value_and_gradients(turn_heads, x, gain, cos, sin)

    assert [one.dtype for one in found[:2]] == [torch.bfloat16] * 2
    for ours, theirs in zip(found, value_and_gradients(plain, *wide), strict=True):
        assert (ours.double() - theirs).norm() < 4e-3 * theirs.norm()
    if has_gain:
        assert found[2].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_heads_near_zero_are_normed_with_the_epsilon_that_torch_takes(dtype):
    x, _, cos, sin = arguments((2, 9, 8, 64, 16), False, dtype)
    small = x.detach() * 2e-4

    found = turn_heads(small, None, cos, sin)

    assert 0.1 < found.norm() / turn_heads(x, None, cos, sin).norm() < 0.9
    torch.testing.assert_close(found.norm(dim=-1), norm(small).norm(dim=-1), rtol=1e-2, atol=0)


@gains
def test_it_compiles_as_one_graph_with_the_same_gradients(has_gain):
    given = arguments((2, 5, 4, 16, 8), has_gain, torch.float32)

    def step(x, gain, cos, sin):
        return turn_heads(x.flatten(-2).sin().unflatten(-1, (4, 16)), gain, cos, sin).square()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")

    found = value_and_gradients(compiled, *given)

    torch.testing.assert_close(found, value_and_gradients(step, *given))


def test_heads_may_lie_in_memory_as_they_like():
    x, gain, cos, sin = arguments((2, 6, 4, 16, 8), True, torch.float32)
    together = drawn(2, 6, 12, 16, seed=3, dtype=torch.float32)
    together[:, :, 4:8] = x.detach()
    part = together[:, :, 4:8].requires_grad_()
    turned = x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()

    def ends(leaf):
        out = turn_heads(leaf, gain, cos, sin)
        d_out = drawn(2, 4, 6, 16, seed=4, dtype=torch.float32).transpose(1, 2)
        return out, *torch.autograd.grad(out, (leaf, gain), d_out)

    expected = ends(x)

    torch.testing.assert_close(ends(part), expected)
    torch.testing.assert_close(ends(turned), expected)


def test_the_last_positions_are_turned_by_their_own_angles():
    x, gain, cos, sin = arguments((1, 6, 4, 16, 8), True, torch.float32)

    last = turn_heads(x[:, -2:], gain, cos[:, -2:], sin[:, -2:])

    torch.testing.assert_close(last, turn_heads(x, gain, cos, sin)[:, -2:])


@gains
def test_an_operator_keeps_the_rules_of_the_dispatcher(has_gain):
    given = arguments((2, 3, 4, 16, 8), has_gain, torch.float32)

    torch.library.opcheck(torch.ops.fairway.turn_heads.default, given)


def test_a_table_or_a_gain_of_another_shape_is_named():
    x, gain, cos, sin = arguments((2, 6, 4, 16, 8), True)

    with pytest.raises(ValueError, match=r"cos is \(1, 5, 1, 4\)"):
        turn_heads(x, gain, cos[:, 1:], sin[:, 1:])
    with pytest.raises(ValueError, match=r"gain is \(3,\): be \(4,\)"):
        turn_heads(x, gain[1:], cos, sin)


def compare_interpreted():
    """The kernels themselves, where Triton's interpreter runs them: see the test below."""
    from trainer.kernels.heads_triton import triton_backward, triton_forward

    close = {"rtol": 1e-4, "atol": 1e-4}
    for shape in (*SHAPES, (2, 65, 4, 64, 16)):
        for has_gain in (False, True):
            x, gain, cos, sin = (
                None if one is None else one.detach()
                for one in arguments(shape, has_gain, torch.float32)
            )
            batch, times, heads, width, _ = shape
            d_out = drawn(batch, heads, times, width, seed=5, dtype=torch.float32).transpose(1, 2)
            given = (x.mT.contiguous().mT, gain, cos, sin)
            torch.testing.assert_close(triton_forward(*given), plain_forward(*given), **close)
            found, expected = (run(d_out, *given) for run in (triton_backward, plain_backward))
            torch.testing.assert_close(found, expected, **close)


@needs_triton
def test_the_triton_kernels_interpreted_say_what_the_plain_twin_says():
    interpret("from tests.unit import test_kernels_heads as cases; cases.compare_interpreted()")
