from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import gptq_reference
from trainer.errors import DataError, UsageError
from trainer.finalize.gptq import factorize, round_rows, row_errors
from trainer.finalize.quantize import quantize_matrix, quantize_tensors
from trainer.finalize.stored import Quantized, restore
from trainer.quant import row_scale
from trainer.sizes import TensorSize
from trainer.specs.final import Bits, Clips, Gptq, Int8Rule, Quantize

PLAIN = Quantize(bits=Bits(mlp=4), float_numel=0)
CLIPS = st.sampled_from(["none", "p5", "r9", "sd3"])


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(width, seed=0, num_tokens=512):
    """The Hessian of inputs of which each looks like the one before, of unequal sizes."""
    x = drawn(num_tokens, width, seed=seed)
    for column in range(1, width):
        x[:, column] += 0.9 * x[:, column - 1]
    x *= 0.1 + drawn(width, seed=seed + 1).abs()
    return x.T @ x / num_tokens


def store(weight, spec, hessian=None, *, name="w", role="matrix", part="mlp"):
    """Store one tensor; return its form and its record."""
    size = TensorSize(name, tuple(weight.shape), role, part)
    hessians = {} if hessian is None else {name: hessian}
    stored, (record,) = quantize_tensors({name: weight}, [size], spec, hessians)
    return stored[name], record


def output_error(weight, stored, hessian):
    error = (weight - restore(stored)).double()
    return float((error @ hessian.double() * error).sum()) / weight.numel()


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("block", [1, 5, 128])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (4, True), (6, True)])
def test_rounding_equals_the_slow_plain_twin(act_order, block, bits, symmetric):
    weight, hessian = drawn(5, 19, seed=bits), correlated(19)
    spec = Gptq(act_order=act_order, block=block)
    scale = row_scale(weight.abs().amax(dim=1), bits, 1e-12)

    q = round_rows(weight, scale, bits, factorize(hessian, spec, "w"), block, symmetric=symmetric)

    plain = gptq_reference.round_matrix(
        weight, scale, bits, hessian, spec.damping, act_order=act_order, symmetric=symmetric
    )
    assert q.tolist() == plain


@pytest.mark.parametrize("clip", ["none", "p9", "sd2.5"])
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_inputs_that_do_not_know_one_another_leave_rounding_to_nearest(clip, scope):
    weight = drawn(6, 40)
    spec = replace(PLAIN, clip=clip, clip_scope=scope)

    by_hessian, record = store(weight, replace(spec, gptq=Gptq()), torch.eye(40))

    nearest, _ = store(weight, spec)
    assert torch.equal(by_hessian.q, nearest.q)
    assert torch.equal(by_hessian.scale, nearest.scale)
    assert record.hessian_error == record.nearest_hessian_error


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 24)),
    bits=st.integers(2, 8),
    clip=CLIPS,
    scope=st.sampled_from(["row", "matrix"]),
    num_tokens=st.integers(1, 40),
    int8=st.none() | st.just(Int8Rule(scale_floor=1e-12)),
    seed=st.integers(0, 2**16),
)
def test_the_error_at_the_output_is_never_above_that_of_nearest(
    shape, bits, clip, scope, num_tokens, int8, seed
):
    weight, hessian = drawn(*shape, seed=seed), correlated(shape[1], seed + 1, num_tokens)
    spec = replace(PLAIN, bits=Bits(mlp=bits), clip=clip, clip_scope=scope, int8=int8)

    stored, record = store(weight, replace(spec, gptq=Gptq()), hessian)

    nearest, _ = quantize_matrix(weight, bits, spec)
    assert record.method == "gptq"
    assert record.nearest_hessian_error == pytest.approx(
        output_error(weight, nearest, hessian), rel=1e-3, abs=1e-7
    )
    assert record.hessian_error == pytest.approx(
        output_error(weight, stored, hessian), rel=1e-3, abs=1e-7
    )
    assert record.hessian_error <= record.nearest_hessian_error


@pytest.mark.parametrize("clip", ["none", "p5", "sd3"])
def test_correlated_inputs_lose_far_more_than_a_third_of_the_error(clip):
    weight, hessian = drawn(64, 96), correlated(96)

    _, record = store(weight, replace(PLAIN, clip=clip, gptq=Gptq()), hessian)

    assert record.hessian_error < 0.5 * record.nearest_hessian_error


def test_each_row_keeps_the_candidate_that_costs_least_at_the_output():
    weight, hessian = drawn(12, 48) ** 3, correlated(48)
    spec = replace(PLAIN, gptq=Gptq())

    searched, _ = store(weight, replace(spec, clip="r9"), hessian)
    alone, _ = store(weight, spec, hessian)

    errors = [row_errors(weight - restore(form), hessian) for form in (searched, alone)]
    assert bool((errors[0] <= errors[1]).all())
    assert bool((errors[0] < errors[1]).any())


def test_a_clip_for_the_whole_matrix_is_one_candidate_in_every_row():
    weight, hessian = drawn(12, 48) ** 3, correlated(48)
    spec = replace(PLAIN, clip="r9", clip_scope="matrix", gptq=Gptq())

    stored, _ = store(weight, spec, hessian)

    ratio = stored.scale.float() * 7 / weight.abs().amax(dim=1)
    assert float(ratio.max() - ratio.min()) < 1e-3


def test_columns_are_put_back_where_they_were():
    weight, hessian = drawn(8, 30), correlated(30)
    shuffled = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    spec = replace(PLAIN, gptq=Gptq())

    there, _ = store(weight[:, shuffled], spec, hessian[shuffled][:, shuffled])

    here, _ = store(weight, spec, hessian)
    assert torch.equal(there.q, here.q[:, shuffled])


def test_inputs_that_are_always_zero_get_weights_of_zero():
    weight, hessian = drawn(6, 20), correlated(20)
    hessian[[3, 11]] = 0.0
    hessian[:, [3, 11]] = 0.0

    stored, record = store(weight, replace(PLAIN, gptq=Gptq()), hessian)

    zero = (stored.q == 0).all(dim=0)
    assert zero.nonzero().flatten().tolist() == [3, 11]
    assert record.hessian_error < record.nearest_hessian_error


def test_a_matrix_that_was_never_fed_is_rounded_to_nearest():
    weight = drawn(4, 12)

    stored, record = store(weight, replace(PLAIN, gptq=Gptq()), torch.zeros(12, 12))

    assert torch.equal(stored.q, store(weight, PLAIN)[0].q)
    assert record.hessian_error == 0.0


def test_what_was_pruned_stays_zero():
    weight, hessian = drawn(16, 64), correlated(64)
    weight[weight.abs() < 0.6] = 0.0

    stored, record = store(weight, replace(PLAIN, clip="sd3", gptq=Gptq()), hessian)

    assert bool((stored.q[weight == 0] == 0).all())
    assert record.hessian_error < 0.9 * record.nearest_hessian_error


def test_damping_grows_tenfold_until_the_factorization_succeeds():
    hessian = correlated(16)
    lowest = torch.linalg.eigvalsh(hessian)[0]
    hessian -= (lowest + 0.05 * hessian.diagonal().mean()) * torch.eye(16)

    _, record = store(drawn(4, 16), replace(PLAIN, gptq=Gptq(damping=0.001)), hessian)

    assert record.damping == pytest.approx(0.1)


def test_a_singular_hessian_is_damped_and_used():
    x = drawn(1, 16)

    _, record = store(drawn(4, 16), replace(PLAIN, gptq=Gptq()), x.T @ x)

    assert record.damping == 0.01
    assert record.hessian_error < 0.1 * record.nearest_hessian_error


@pytest.mark.parametrize(("hessian", "why"), [
    (-1e9 * torch.eye(8) + torch.ones(8, 8), "cannot be factorized, not even with damping 100"),
    (torch.full((8, 8), torch.nan), "is not finite"),
])  # fmt: skip
def test_a_hessian_of_no_use_is_refused_by_name(hessian, why):
    with pytest.raises(DataError, match=f"^up: its Hessian {why}"):
        store(drawn(4, 8), replace(PLAIN, gptq=Gptq()), hessian, name="up")


def test_missing_and_misfitting_hessians_are_refused():
    spec = replace(PLAIN, gptq=Gptq())
    size = TensorSize("up", (4, 8), "matrix", "mlp")

    with pytest.raises(UsageError, match=r"^final\.quantize\.gptq: no Hessians"):
        quantize_tensors({"up": drawn(4, 8)}, [size], spec)
    with pytest.raises(UsageError, match=r"^up: a Hessian of shape \(4, 4\) for inputs of 8"):
        store(drawn(4, 8), spec, torch.eye(4), name="up")


def test_a_matrix_without_a_hessian_is_rounded_to_nearest_and_says_so():
    weight = drawn(6, 8)

    stored, record = store(weight, replace(PLAIN, gptq=Gptq()), part="hash", role="embed")

    assert torch.equal(stored.q, store(weight, PLAIN, part="hash", role="embed")[0].q)
    assert record.method == "nearest"
    assert (record.hessian_error, record.nearest_hessian_error, record.damping) == (None,) * 3


@pytest.mark.parametrize(("role", "embeddings", "method"), [
    ("embed", True, "gptq"), ("embed", False, "nearest"), ("head", False, "gptq"),
])  # fmt: skip
def test_the_token_table_is_rounded_by_its_hessian_only_where_the_spec_says_so(
    role, embeddings, method
):
    spec = replace(PLAIN, gptq=Gptq(embeddings=embeddings))

    _, record = store(drawn(6, 8), spec, correlated(8), role=role, part="embed")

    assert record.method == method


def test_floats_are_not_touched_by_a_hessian():
    weight = drawn(6, 8)
    spec = replace(PLAIN, bits=Bits(mlp=16), gptq=Gptq())

    stored, record = store(weight, spec, correlated(8))

    assert torch.equal(restore(stored), weight.half().float())
    assert record.method == "float"


def test_important_rows_get_wider_clips():
    weight, hessian = drawn(3, 200), torch.diag(torch.linspace(0.01, 5.0, 200))
    weight[0, 150:] *= 4.0
    spec = replace(PLAIN, clip="sd4", gptq=Gptq(row_importance=0.5))

    stored, _ = store(weight, spec, hessian)

    weighted = (weight.abs() * hessian.diagonal()).mean(dim=1)
    stretch = 1 + 0.5 * (weighted / weighted.mean() - 1)
    expected = 4 * weight.std(dim=1, correction=0) * stretch / 7
    assert stored.scale.float().tolist() == pytest.approx(expected.tolist(), rel=1e-3)
    assert float(stretch[0]) > 1.1


def test_neighbours_that_share_a_hessian_are_rounded_as_if_alone():
    names, hessian = ("query", "key", "out"), correlated(24)
    sizes = [TensorSize(name, (6, 24), "matrix", "mlp") for name in names]
    state = {name: drawn(6, 24, seed=seed) for seed, name in enumerate(names)}
    hessians = {"query": hessian, "key": hessian, "out": correlated(24, seed=9)}
    spec = replace(PLAIN, gptq=Gptq())

    together, records = quantize_tensors(state, sizes, spec, hessians)

    for size, record in zip(sizes, records, strict=True):
        alone, its_own = store(state[size.name], spec, hessians[size.name].clone(), name=size.name)
        assert torch.equal(together[size.name].q, alone.q)
        assert record == its_own


def test_rounding_twice_gives_the_same_records_and_integers():
    weight, hessian = drawn(16, 64), correlated(64)
    spec = replace(PLAIN, clip="p5", gptq=Gptq())

    one, two = (store(weight, spec, hessian) for _ in range(2))

    assert torch.equal(one[0].q, two[0].q)
    assert one[1] == two[1]


def test_a_class_of_tensors_takes_its_own_clip():
    weight, hessian = drawn(6, 32), correlated(32)
    spec = replace(PLAIN, clip="sd9", clips=Clips(mlp="sd2"), gptq=Gptq())

    own, _ = store(weight, spec, hessian)
    common, _ = store(weight, replace(spec, bits=Bits(attention=4)), hessian, part="attention")

    assert isinstance(own, Quantized)
    ratio = common.scale.float() / own.scale.float()
    assert ratio.tolist() == pytest.approx([4.5] * 6, rel=2e-3)
