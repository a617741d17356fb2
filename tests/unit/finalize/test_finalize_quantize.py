import pytest
import torch

from tests.reference import quantize_reference
from trainer.errors import DataError, UsageError
from trainer.finalize.quantize import quantize_matrix, quantize_tensors
from trainer.finalize.stored import Floats, Quantized, restore
from trainer.sizes import TensorSize
from trainer.specs.final import CLIP_CANDIDATES, Bits, Clips, Int8Rule, Quantize


def heavy_tailed(rows, cols, seed):
    """Rows of different size, each with a few outliers, so that candidates differ."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator) ** 3
    return weight * torch.rand(rows, 1, generator=generator)


def squared_error(weight, quantized):
    return (weight - restore(quantized)).double().square().sum(dim=1)


def store(weight, spec, *, role="matrix", part="mlp", name="w"):
    """Store one tensor; return its form and its record."""
    size = TensorSize(name, tuple(weight.shape), role, part)
    stored, (record,) = quantize_tensors({name: weight}, [size], spec)
    return stored[name], record


@pytest.mark.parametrize("clip", ["none", "p3", "p5", "p9", "r9", "sd3", "sd12.85"])
@pytest.mark.parametrize("bits", [3, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_search_equals_the_slow_plain_twin(clip, bits, symmetric):
    weight = heavy_tailed(6, 101, seed=bits)
    spec = Quantize(clip=clip, scale_floor=0.01, symmetric=symmetric)

    fast, _ = quantize_matrix(weight, bits, spec)
    q, scales, _ = quantize_reference.quantize_matrix(weight, bits, clip, 0.01, symmetric=symmetric)

    assert fast.scale.tolist() == scales
    assert fast.q.tolist() == q


@pytest.mark.parametrize("clip", CLIP_CANDIDATES)
@pytest.mark.parametrize("bits", [3, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_search_over_the_whole_matrix_equals_the_slow_plain_twin(clip, bits, symmetric):
    weight = heavy_tailed(6, 101, seed=bits)
    spec = Quantize(clip=clip, clip_scope="matrix", scale_floor=0.01, symmetric=symmetric)

    fast, _ = quantize_matrix(weight, bits, spec)
    q, scales, _ = quantize_reference.quantize_whole_matrix(
        weight, bits, clip, 0.01, symmetric=symmetric
    )

    assert fast.scale.tolist() == scales
    assert fast.q.tolist() == q


@pytest.mark.parametrize("clip", CLIP_CANDIDATES)
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_search_is_never_worse_than_the_row_maximum(clip, bits):
    weight = heavy_tailed(32, 256, seed=1)
    plain, _ = quantize_matrix(weight, bits, Quantize())

    searched, _ = quantize_matrix(weight, bits, Quantize(clip=clip))

    assert bool((squared_error(weight, searched) <= squared_error(weight, plain)).all())


def smooth_and_spiked():
    """Two rows whose best clips differ: at the maximum, and far below it."""
    smooth, spiked = torch.linspace(-1, 1, 128), torch.full((128,), 0.01)
    spiked[3] = 1.0
    return torch.stack([smooth, spiked])


def test_search_chooses_each_row_for_itself():
    weight, spec = smooth_and_spiked(), Quantize(clip="p9")

    together, _ = quantize_matrix(weight, 3, spec)

    alone = [quantize_matrix(row.unsqueeze(0), 3, spec)[0].scale for row in weight]
    assert torch.equal(together.scale, torch.cat(alone))


def test_search_over_the_matrix_gives_every_row_the_same_candidate():
    weight = torch.cat([heavy_tailed(30, 128, seed=4), smooth_and_spiked()])
    shares = CLIP_CANDIDATES["p9"]
    each = [
        torch.quantile(weight.abs(), share, dim=1).div(3).clamp(min=2.0**-24).half()
        for share in shares
    ]

    chosen, _ = quantize_matrix(weight, 3, Quantize(clip="p9", clip_scope="matrix"))

    assert any(torch.equal(chosen.scale, scale) for scale in each)
    free, _ = quantize_matrix(weight, 3, Quantize(clip="p9"))
    assert not any(torch.equal(free.scale, scale) for scale in each)


@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_of_equally_good_candidates_the_first_is_taken(scope):
    weight = torch.tensor([[0.25, -0.5], [0.5, 0.125]])
    # The floor is the maximum's scale: all candidates round alike, and only the first, smaller
    # ones are below the floor.
    spec = Quantize(clip="p3", clip_scope=scope, scale_floor=0.5 / 31)

    _, floored = quantize_matrix(weight, 6, spec)

    assert floored.tolist() == [True, True]


@pytest.mark.parametrize("quantile", [0.9999984, 0.97])
@pytest.mark.parametrize("scale_floor", [1 / 127, 1e-12])
def test_the_rule_for_eight_bits_equals_the_slow_plain_twin(quantile, scale_floor):
    weight = heavy_tailed(12, 101, seed=5)
    weight[::2] *= 0.01
    rule = Int8Rule(quantile=quantile, scale_floor=scale_floor)

    fast, floored = quantize_matrix(weight, 8, Quantize(int8=rule))
    q, scales = quantize_reference.quantize_int8(weight, quantile, scale_floor)

    assert fast.q.tolist() == q
    assert fast.scale.tolist() == scales
    assert bool(floored.any()) == (scale_floor == 1 / 127)


def test_the_rule_for_eight_bits_rounds_by_the_scale_before_float16():
    weight = heavy_tailed(200, 64, seed=6)

    ruled, _ = quantize_matrix(weight, 8, Quantize(int8=Int8Rule(scale_floor=1e-12)))

    by_what_is_stored = torch.round(weight / ruled.scale.float().unsqueeze(1)).clamp(-127, 127)
    assert not torch.equal(ruled.q, by_what_is_stored.to(torch.int8))


def test_the_rule_for_eight_bits_leaves_other_bits_alone():
    weight = heavy_tailed(4, 64, seed=7)

    plain, _ = quantize_matrix(weight, 7, Quantize(clip="p5"))
    ruled, _ = quantize_matrix(weight, 7, Quantize(clip="p5", int8=Int8Rule(quantile=0.5)))

    assert torch.equal(plain.q, ruled.q)


def test_the_rule_for_eight_bits_stores_a_valid_scale_for_a_row_of_zeros():
    rule = Int8Rule(scale_floor=1e-12)

    ruled, _ = quantize_matrix(torch.zeros(2, 4), 8, Quantize(int8=rule))

    assert bool((ruled.scale > 0).all())
    assert torch.equal(restore(ruled), torch.zeros(2, 4))


def test_floor_share_counts_rows_whose_scale_is_the_floor():
    weight = torch.tensor([[0.1, -0.2], [3.0, 1.0], [0.5, 0.5], [0.0, 0.0]])

    _, record = store(weight, Quantize(scale_floor=1 / 31, float_numel=0))

    assert record.floor_share == 0.75
    assert record.bits == 6


BITS = Bits(mlp=2, attention=3, hash=4, embed=5, other=7, scalar=32)
LISTED = (
    TensorSize("up", (3, 4), "matrix", "mlp"),
    TensorSize("query", (3, 4), "matrix", "attention"),
    TensorSize("pairs", (3, 4), "embed", "hash"),
    TensorSize("pairs out", (3, 4), "matrix", "hash"),
    TensorSize("tokens", (3, 4), "embed", "embed"),
    TensorSize("head", (3, 4), "head", "embed"),
    TensorSize("values", (3, 4), "embed", "other"),
    TensorSize("small", (2, 2), "matrix", "mlp"),
    TensorSize("gain", (100,), "scalar", "scalar"),
)


def test_classes_and_sizes_decide_the_bits():
    state = {size.name: torch.ones(size.shape) for size in LISTED}

    stored, records = quantize_tensors(state, LISTED, Quantize(bits=BITS, float_numel=4))

    assert [record.bits for record in records] == [2, 3, 4, 4, 5, 5, 7, 16, 32]
    assert [record.part for record in records] == [size.part for size in LISTED]
    assert isinstance(stored["tokens"], Quantized)
    assert isinstance(stored["small"], Floats)


def test_each_class_takes_its_own_clip_or_the_common_one():
    state = {
        size.name: heavy_tailed(*size.shape, seed=1) for size in LISTED if size.role != "scalar"
    }
    sizes = [size for size in LISTED if size.role != "scalar"]
    spec = Quantize(bits=BITS, float_numel=4, clip="sd3", clips=Clips(attention="p5", hash="none"))

    stored, _ = quantize_tensors(state, sizes, spec)

    own = {"query": "p5", "pairs": "none", "pairs out": "none", "up": "sd3", "values": "sd3"}
    for name, clip in own.items():
        bits = stored[name].bits
        alone, _ = quantize_matrix(state[name], bits, Quantize(clip=clip))
        assert torch.equal(stored[name].scale, alone.scale)
        assert torch.equal(stored[name].q, alone.q)
    assert not torch.equal(stored["query"].scale, quantize_matrix(state["query"], 3, spec)[0].scale)


def test_records_say_how_a_tensor_was_stored_and_how_long_that_took():
    state = {size.name: torch.ones(size.shape) for size in LISTED}

    _, records = quantize_tensors(state, LISTED, Quantize(bits=BITS, float_numel=4))

    assert [record.method for record in records] == ["nearest"] * 7 + ["float"] * 2
    assert all(record.seconds > 0.0 for record in records)
    assert all(record.bytes is None for record in records)


def test_sixteen_bits_are_float16():
    weight = heavy_tailed(4, 8, seed=8)

    stored, record = store(weight, Quantize(bits=Bits(mlp=16), float_numel=0))

    assert torch.equal(restore(stored), weight.half().float())
    assert record.bits == 16


def test_kept_keys_are_float16_and_other_layers_are_not():
    sizes = [
        TensorSize(f"blocks.{layer}.attention.{name}.weight", (4, 8), "matrix", "attention")
        for layer in range(2)
        for name in ("key", "value")
    ]
    state = {size.name: torch.ones(size.shape) for size in sizes}

    _, records = quantize_tensors(state, sizes, Quantize(float_numel=0, float16_keys=(1,)))

    assert [record.bits for record in records] == [6, 6, 16, 6]


def test_a_kept_key_that_the_model_does_not_have_is_refused():
    with pytest.raises(UsageError, match=r"^final\.quantize\.float16_keys: .*blocks\.9\.attention"):
        store(torch.ones(2, 2), Quantize(float16_keys=(9,)))


def test_scalars_are_stored_exactly():
    gain = torch.tensor([1 / 3, 1e-30, -1e30])

    stored, record = store(gain, Quantize(), role="scalar", part="scalar")

    assert torch.equal(restore(stored), gain)
    assert record.mse == 0.0


def test_scalars_are_float16_where_the_spec_says_so():
    gain = torch.tensor([1 / 3, -2.0])

    stored, record = store(gain, Quantize(bits=Bits(scalar=16)), role="scalar", part="scalar")

    assert torch.equal(restore(stored), gain.half().float())
    assert record.bits == 16


def test_record_carries_the_error_of_what_is_stored():
    weight = heavy_tailed(4, 32, seed=3)

    stored, record = store(weight, Quantize(bits=Bits(mlp=4), float_numel=0))

    error = (weight - restore(stored)).abs()
    assert record.max_error == float(error.max())
    assert record.mse == pytest.approx(float(error.square().mean()))


def test_tensor_of_the_state_alone_or_of_the_model_alone_is_refused_by_name():
    listed = [TensorSize("known", (2, 2), "matrix", "mlp")]
    known = torch.ones(2, 2)

    with pytest.raises(DataError, match=r"^lost\.weight: not in the model"):
        quantize_tensors({"known": known, "lost.weight": known}, listed, Quantize())
    with pytest.raises(DataError, match=r"^known: not in the state"):
        quantize_tensors({}, listed, Quantize())


@pytest.mark.parametrize(("role", "part"), [("matrix", "mlp"), ("scalar", "scalar")])
def test_weight_beyond_float16_is_refused_by_name(role, part):
    with pytest.raises(DataError, match=r"^big: a weight of magnitude 100000"):
        store(
            torch.tensor([[1e5]]), Quantize(bits=Bits(scalar=16)), role=role, part=part, name="big"
        )
