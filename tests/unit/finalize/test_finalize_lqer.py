from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.finalize.gptq import factorize, row_errors
from trainer.finalize.lqer import repair
from trainer.finalize.quantize import quantize_matrix, quantize_tensors
from trainer.finalize.stored import LOW_RANK_GROUP, LowRank, low_rank_product, restore
from trainer.sizes import TensorSize
from trainer.specs.final import Bits, Gptq, Lqer, Quantize

PLAIN = Quantize(bits=Bits(mlp=3), float_numel=0)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def store(weights, spec, hessians=None):
    """Store matrices by name; return their forms and their records by name."""
    sizes = [TensorSize(name, tuple(w.shape), "matrix", "mlp") for name, w in weights.items()]
    stored, records = quantize_tensors(weights, sizes, spec, hessians)
    return stored, {record.name: record for record in records}


def leaning(rows, cols, seed=0):
    """A matrix whose rounding leans in a few directions: its clip cuts the same large columns off
    in every row."""
    weight = drawn(rows, cols, seed=seed)
    weight[:, :3] = 9.0 * (1.0 + 0.1 * drawn(rows, 3, seed=seed + 1))
    return weight


def test_the_matrices_of_the_largest_error_are_repaired_and_no_other():
    weights = {f"w{size}": leaning(24, 100, seed=size) * size for size in (4, 1, 5, 2, 3)}
    spec = replace(PLAIN, clip="sd1.5", lqer=Lqer(tensors=2, rank=3))

    stored, records = store(weights, spec)

    repaired = {name for name in weights if stored[name].low_rank is not None}
    assert repaired == {"w4", "w5"}
    assert {name: record.low_rank for name, record in records.items()} == {
        name: 3 if name in repaired else None for name in weights
    }


def test_a_repair_takes_away_most_of_an_error_that_leans():
    weight = leaning(40, 150)
    spec = replace(PLAIN, clip="sd1.5")

    _, plain = store({"w": weight}, spec)
    stored, repaired = store({"w": weight}, replace(spec, lqer=Lqer()))

    assert repaired["w"].mse < 0.4 * plain["w"].mse
    error = weight - restore(stored["w"])
    assert repaired["w"].mse == pytest.approx(float(error.square().mean()))
    assert repaired["w"].max_error == float(error.abs().max())


@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 140)),
    rank=st.integers(1, 20),
    bits=st.integers(2, 8),
    by_hessian=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_repair_never_raises_the_error_and_keeps_its_grids(shape, rank, bits, by_hessian, seed):
    weight, x = drawn(*shape, seed=seed), drawn(30, shape[1], seed=seed + 1).cumsum(dim=1)
    spec = replace(PLAIN, bits=Bits(mlp=bits), gptq=Gptq() if by_hessian else None)
    hessians = {"w": x.T @ x} if by_hessian else None
    metric = "hessian_error" if by_hessian else "mse"

    _, plain = store({"w": weight}, spec, hessians)
    stored, repaired = store({"w": weight}, replace(spec, lqer=Lqer(rank=rank)), hessians)

    part = stored["w"].low_rank
    if part is None:
        assert getattr(repaired["w"], metric) == getattr(plain["w"], metric)
        return
    assert getattr(repaired["w"], metric) < getattr(plain["w"], metric)
    width = min(rank, *shape)
    assert part.a.shape == (shape[0], width)
    assert part.b.shape == (width, shape[1])
    assert part.b_scale.shape == (width, -(-shape[1] // LOW_RANK_GROUP))
    assert part.a_scale.numel() == 1
    assert -2 <= int(part.a.min()) <= int(part.a.max()) <= 1
    assert -8 <= int(part.b.min()) <= int(part.b.max()) <= 7
    for scale in (part.a_scale, part.b_scale):
        assert scale.dtype == torch.float16
        assert bool((scale > 0).all() & torch.isfinite(scale).all())


def test_with_a_hessian_what_counts_at_the_output_is_repaired():
    weight = drawn(48, 128)
    x = drawn(600, 4) @ drawn(4, 128, seed=1) + 0.2 * drawn(600, 128, seed=2)
    hessian = x.T @ x / 600
    nearest, _ = quantize_matrix(weight, 3, PLAIN)

    by_hessian = repair(weight, nearest, 4, factorize(hessian, Gptq(), "w"))
    by_squares = repair(weight, nearest, 4, None)

    errors = [
        float(row_errors(weight - restore(form), hessian).sum())
        for form in (by_hessian, by_squares, nearest)
    ]
    assert errors[0] < 0.4 * errors[1]
    assert errors[0] < 0.4 * errors[2]


def test_a_matrix_without_error_is_left_as_it_is():
    weight = torch.tensor([[3.0, -1.0, 2.0], [0.0, 0.0, 0.0]])

    stored, records = store({"w": weight}, replace(PLAIN, lqer=Lqer()))

    assert stored["w"].low_rank is None
    assert records["w"].low_rank is None


def test_floats_are_never_repaired():
    weight = drawn(8, 8)
    spec = replace(PLAIN, bits=Bits(mlp=16), lqer=Lqer())

    _, records = store({"w": weight}, spec)

    assert records["w"].method == "float"
    assert records["w"].low_rank is None


def test_the_product_is_that_of_the_scaled_factors():
    a, b = drawn(5, 2).mul(1.5).round().clamp(-2, 1), drawn(2, 70).mul(4).round().clamp(-8, 7)
    b_scale = torch.tensor([[0.5, 2.0], [0.25, 1.0]]).half()
    part = LowRank(a.to(torch.int8), torch.tensor(0.125).half(), b.to(torch.int8), b_scale)

    wide = torch.cat([b_scale[:, :1].expand(2, 64), b_scale[:, 1:].expand(2, 6)], dim=1)
    assert torch.equal(low_rank_product(part), 0.125 * a @ (b * wide.float()))
