import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.strategies import models
from trainer.blueprint import blueprint
from trainer.codec import parse
from trainer.finalize.artifact import write_weights
from trainer.finalize.prune import prune
from trainer.finalize.quantize import quantize_matrix, quantize_tensors
from trainer.model.build import build
from trainer.model.roles import roles_of
from trainer.rows import typical_deviations
from trainer.sizes import (
    CONTAINER_FACTORS,
    ROW_STDS,
    TYPICAL_ROW_STD,
    TensorSize,
    bits_per_weight,
    flops_per_token,
    forecast_interval,
    forecast_weights_bytes,
    gaussian_code,
    is_pruned,
    num_params,
    tensor_sizes,
)
from trainer.specs.final import (
    Bits,
    Brotli,
    Clips,
    FinalSpec,
    Int8Rule,
    Lzma,
    Prune,
    Quantize,
    RangeCoder,
    TrimOnes,
    Zlib,
    Zstd,
)
from trainer.specs.model import (
    Attention,
    HashEmbedding,
    Mlp,
    ModelSpec,
    Mtp,
    QGain,
    Recurrence,
    ResidualScale,
    SharedKv,
    SmearV1,
    UNetSkips,
    UntiedHead,
    ValueEmbedding,
    X0Mix,
)
from trainer.specs.recipe import Recipe
from tune_spaces.catalogue import load_recipe

MODEL = tiny.full_model(
    vocab_size=512, dim=128, num_layers=2, attention=Attention(num_heads=4, num_kv_heads=2)
)


@settings(max_examples=40)
@given(models())
def test_the_list_of_sizes_is_the_built_model(spec):
    model = build(spec)
    roles = roles_of(model)

    built = [(name, tuple(p.shape), roles[name]) for name, p in model.named_parameters()]

    assert [(t.name, t.shape, t.role) for t in tensor_sizes(blueprint(spec))] == built
    assert num_params(spec) == sum(p.numel() for p in model.parameters())


def test_the_baseline_has_the_published_number_of_parameters():
    recipe = parse(Recipe, load_recipe("baseline", "test"), "baseline")

    assert num_params(recipe.model) == 17_059_912


def mlp(row):
    return TensorSize("blocks.0.mlp.up.weight", (256, row), "matrix", "mlp")


@pytest.mark.parametrize(
    ("bits", "clip", "row", "entropy"),
    [
        (4, "none", 512, 3.18),
        (5, "none", 512, 4.27),
        (6, "none", 512, 5.31),
        (6, "sd12.85", 512, 3.33),
        (6, "sd11.5", 512, 3.49),
        (6, "sd10", 512, 3.69),
        (7, "sd14", 512, 4.22),
        (8, "sd20", 512, 4.72),
    ],
)
def test_bits_per_weight_are_those_measured_on_gaussian_rows(bits, clip, row, entropy):
    spec = Quantize(bits=Bits(mlp=bits), clip=clip, float_numel=0)

    assert bits_per_weight(mlp(row), spec) == pytest.approx(entropy, abs=0.06)


def entropy_of(weight, bits, spec):
    q = quantize_matrix(weight, bits, spec)[0].q
    shares = torch.bincount(q.flatten().int() + 128).double() / q.numel()
    return -float(torch.xlogy(shares, shares).sum()) / math.log(2)


@pytest.mark.parametrize(
    ("bits", "spec"),
    [
        (6, Quantize(clip="p5", clip_scope="matrix", scale_floor=1 / 31)),
        (6, Quantize(scale_floor=1e-4)),
        (8, Quantize(int8=Int8Rule())),
        (8, Quantize(int8=Int8Rule(scale_floor=1e-12), scale_floor=1.0)),
        (8, Quantize(clip="sd12", scale_floor=1 / 60)),
    ],
)
def test_the_floor_of_the_scale_is_forecast_for_rows_of_the_typical_deviation(bits, spec):
    noise = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))

    measured = entropy_of(TYPICAL_ROW_STD * noise, bits, spec)

    of_class = replace(spec, bits=Bits(mlp=bits), float_numel=0)
    assert bits_per_weight(mlp(512), of_class) == pytest.approx(measured, abs=0.06)


@pytest.mark.parametrize("row", [64, 512, 2048])
def test_the_row_maximum_is_that_of_normal_draws(row):
    draws = torch.randn(4000, row, generator=torch.Generator().manual_seed(0))
    measured = float(draws.abs().amax(dim=1).mean())

    forecast = 31 / 2 ** (bits_per_weight(mlp(row), Quantize(float_numel=0)) - 2.047)

    assert forecast == pytest.approx(measured, rel=0.02)


def written_bytes(final, path):
    """Write Gaussian weights as an artifact and return the file's size."""
    generator = torch.Generator().manual_seed(0)
    sizes = tensor_sizes(blueprint(MODEL))
    state = {t.name: TYPICAL_ROW_STD * torch.randn(t.shape, generator=generator) for t in sizes}
    if final.prune is not None:
        for tensor in sizes:
            if is_pruned(tensor, final.prune):
                state[tensor.name] = prune(state[tensor.name], final.prune.ratio)
    stored, _ = quantize_tensors(state, sizes, final.quantize)
    return write_weights(path, MODEL, stored, final.compress, "ab" * 32).num_bytes


@pytest.mark.parametrize(
    "final",
    [
        FinalSpec(
            quantize=Quantize(bits=Bits(mlp=bits, attention=bits), clip=clip, float_numel=4096),
            prune=pruned,
        )
        for bits, clip, pruned in (
            (6, "none", None),
            (4, "p5", None),
            (6, "sd12.85", None),
            (8, "none", Prune(ratio=0.05, larger_than=4096)),
            (6, "none", Prune(ratio=0.3, larger_than=4096)),
            (6, "none", Prune(ratio=0.3, larger_than=4096, tables=True)),
        )
    ]
    + [
        FinalSpec(quantize=Quantize(bits=Bits(mlp=4, embed=16), float_numel=4096)),
        FinalSpec(quantize=Quantize(float_numel=4096, scale_floor=1 / 50, int8=Int8Rule())),
    ],
)
def test_the_forecast_is_near_the_written_file(final, tmp_path):
    forecast = forecast_weights_bytes(MODEL, final)

    assert forecast == pytest.approx(written_bytes(final, tmp_path / "weights.fw"), rel=0.15)


def test_small_tensors_cost_their_floats():
    whole = FinalSpec(quantize=Quantize(float_numel=10**9))
    scalars = sum(t.numel for t in tensor_sizes(blueprint(MODEL)) if t.role == "scalar")

    forecast = forecast_weights_bytes(MODEL, whole)

    floats = 4 * scalars + 2 * (num_params(MODEL) - scalars)
    assert forecast == round(CONTAINER_FACTORS["zstd"] * floats)


def test_each_class_is_forecast_in_its_own_bits():
    model = replace(
        MODEL,
        bigram=HashEmbedding(num_buckets=512, dim=32),
        value_embedding=ValueEmbedding(dim=32),
    )

    def forecast(**bits):
        quantize = Quantize(bits=Bits(**bits), float_numel=0)
        return forecast_weights_bytes(model, FinalSpec(quantize=quantize))

    for part in ("mlp", "attention", "hash", "embed", "other"):
        numel = sum(t.numel for t in tensor_sizes(blueprint(model)) if t.part == part)
        saved = forecast(**{part: 6}) - forecast(**{part: 5})
        assert saved == pytest.approx(CONTAINER_FACTORS["zstd"] * numel / 8, rel=0.1), part


def test_a_kept_key_is_forecast_as_float16():
    def forecast(*layers):
        quantize = Quantize(float_numel=0, float16_keys=layers)
        return forecast_weights_bytes(MODEL, FinalSpec(quantize=quantize))

    assert forecast() < forecast(0) < forecast(0, 1)


def test_what_only_training_uses_is_not_forecast():
    with_heads = replace(MODEL, mtp=Mtp(num_heads=2))

    assert forecast_weights_bytes(with_heads, FinalSpec()) == forecast_weights_bytes(
        MODEL, FinalSpec()
    )


def public_model(num_layers, num_buckets, values):
    """Return the stack of parameter-golf PRs #348 and #414."""
    return ModelSpec(
        vocab_size=1024,
        num_layers=num_layers,
        dim=512,
        bigram=HashEmbedding(num_buckets=num_buckets, dim=128),
        smear=SmearV1(),
        attention=Attention(num_heads=8, num_kv_heads=4, q_gain=QGain()),
        value_embedding=values,
        mlp=Mlp(mult=3.0),
        residual_scale=ResidualScale(),
        x0_mix=X0Mix(),
        unet=UNetSkips(),
    )


PR414 = public_model(11, 2048, ValueEmbedding(dim=128))
PR348 = public_model(10, 12288, None)


@pytest.mark.parametrize(
    ("model", "num_parameters", "final", "measured"),
    [
        (
            PR414,
            26_993_756,
            FinalSpec(
                quantize=Quantize(
                    bits=Bits(scalar=16),
                    clip="p5",
                    clip_scope="matrix",
                    scale_floor=1 / 31,
                    int8=Int8Rule(),
                )
            ),
            15_487_414,
        ),
        (
            PR348,
            25_779_281,
            FinalSpec(
                prune=Prune(ratio=0.05, tables=True),
                quantize=Quantize(
                    bits=Bits(mlp=5, hash=6, embed=16),
                    symmetric=False,
                    float_numel=8192,
                    float16_keys=(8,),
                ),
            ),
            15_848_734,
        ),
    ],
    ids=["pr414", "pr348"],
)
def test_the_forecast_is_near_what_the_public_systems_measured(
    model, num_parameters, final, measured
):
    assert num_params(model) == num_parameters
    assert forecast_weights_bytes(model, final) == pytest.approx(measured, rel=0.06)


@given(
    step=st.floats(0.02, 5.0),
    levels=st.sampled_from([1, 3, 7, 31, 127]),
    zero=st.one_of(st.none(), st.floats(0.0, 2.0)),
)
@settings(max_examples=30, deadline=None)
def test_code_of_a_normal_draw_is_what_rounding_many_gives(step, levels, zero):
    draws = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).double()
    kept = draws if zero is None else torch.where(draws.abs() < zero, 0.0, draws)
    q = torch.round(kept / step).clamp(-levels, levels)
    shares = torch.unique(q, return_counts=True)[1].double() / len(q)

    bits, error = gaussian_code(step, levels, zero)

    assert bits == pytest.approx(-float(torch.xlogy(shares, shares).sum()) / math.log(2), abs=0.02)
    assert error == pytest.approx(float((q * step - draws).square().mean()), rel=0.05, abs=1e-4)


def test_a_class_is_forecast_by_its_own_clip():
    quantize = Quantize(clip="sd12", float_numel=0)
    coarse = replace(quantize, clips=Clips(mlp="sd24"))
    numel = sum(t.numel for t in tensor_sizes(blueprint(MODEL)) if t.part == "mlp")

    plain, other = (
        forecast_weights_bytes(MODEL, FinalSpec(quantize=spec)) for spec in (quantize, coarse)
    )

    assert plain - other == pytest.approx(CONTAINER_FACTORS["zstd"] * numel / 8, rel=0.05)


def test_coders_are_forecast_in_the_order_that_files_have():
    coders = (RangeCoder(), Brotli(), Zstd(), Zlib(), Lzma())

    sizes = [forecast_weights_bytes(MODEL, FinalSpec(compress=coder)) for coder in coders]

    assert sizes == sorted(sizes)
    assert len(set(sizes)) == len(coders)


FLOOR = FinalSpec(quantize=Quantize(scale_floor=1 / 31, float_numel=4096))
FREE = FinalSpec(quantize=Quantize(clip="sd12.85", float_numel=4096))


def test_interval_is_wide_where_the_floor_rules_and_narrow_where_steps_go_with_the_rows():
    floor, free = forecast_interval(MODEL, FLOOR), forecast_interval(MODEL, FREE)

    assert floor.low < floor.point < floor.high
    assert (floor.high - floor.low) / floor.point > 2 * (free.high - free.low) / free.point


def test_measured_rows_narrow_the_interval_where_the_floor_rules():
    sizes = tensor_sizes(blueprint(MODEL))
    stds = {tensor.name: ROW_STDS[0] for tensor in sizes}

    before, after = forecast_interval(MODEL, FLOOR), forecast_interval(MODEL, FLOOR, stds)

    assert after.low == before.low
    assert after.high < before.high
    assert before.low < after.point < before.point


@pytest.mark.parametrize("final", [FLOOR, FREE], ids=["floor", "free"])
def test_written_file_lies_in_the_interval_of_its_own_weights(final, tmp_path):
    generator = torch.Generator().manual_seed(0)
    sizes = tensor_sizes(blueprint(MODEL))
    spread = torch.linspace(0.05, 0.2, 7)
    state = {
        t.name: spread[index % 7] * torch.randn(t.shape, generator=generator)
        for index, t in enumerate(sizes)
    }
    stored, _ = quantize_tensors(state, sizes, final.quantize)
    path = tmp_path / "weights.fw"

    written = write_weights(path, MODEL, stored, final.compress, "ab" * 32).num_bytes

    forecast = forecast_interval(MODEL, final, typical_deviations(state))
    assert forecast.low <= written <= forecast.high


def test_typical_deviation_is_the_geometric_mean_of_the_rows_and_dead_rows_hardly_count():
    noise = torch.randn(4, 4096, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([0.1, 0.4, 0.1, 0.4]).unsqueeze(1) * noise
    dead = torch.cat([rows.repeat(16, 1), torch.zeros(1, 4096)])

    found = typical_deviations({"matrix": rows, "dead": dead, "none": 0 * rows, "gain": rows[0]})

    assert found["matrix"] == pytest.approx(0.2, rel=0.02)
    assert found["dead"] == pytest.approx(0.2, rel=0.08)
    assert found["none"] == 0.0
    assert "gain" not in found


def test_file_that_is_trimmed_is_forecast_at_its_target():
    trimmed = replace(FREE, trim_ones=TrimOnes(weights_bytes=1_000))

    forecast = forecast_interval(MODEL, trimmed)

    assert (forecast.low, forecast.point, forecast.high) == (1_000, 1_000, 1_000)


def test_fewer_bits_and_more_pruning_forecast_fewer_bytes():
    def forecast(bits, ratio):
        quantize = Quantize(bits=Bits(mlp=bits, attention=bits), float_numel=4096)
        prune = Prune(ratio=ratio, larger_than=4096)
        return forecast_weights_bytes(MODEL, FinalSpec(quantize=quantize, prune=prune))

    assert forecast(4, 0.0) < forecast(5, 0.0) < forecast(6, 0.0)
    assert forecast(6, 0.6) < forecast(6, 0.3) < forecast(6, 0.0)


def test_flops_count_matrices_the_head_and_causal_attention():
    spec = ModelSpec(
        vocab_size=10,
        num_layers=3,
        dim=8,
        attention=Attention(num_heads=2, num_kv_heads=1),
        mlp=Mlp(mult=2.0),
    )
    per_layer = 8 * 8 + 2 * 4 * 8 + 8 * 8 + 2 * 16 * 8
    attending = 8 * 100  # scores and their use: half of 2 * dim * context each

    assert flops_per_token(spec, 100) == 2 * (10 * 8 + 3 * (per_layer + attending))
    assert flops_per_token(replace(spec, num_layers=6), 0) == 2 * (10 * 8 + 6 * per_layer)


def test_flops_count_a_matrix_as_often_as_it_is_multiplied():
    spec = ModelSpec(
        vocab_size=10,
        num_layers=3,
        dim=8,
        attention=Attention(num_heads=2, num_kv_heads=1),
        mlp=Mlp(mult=2.0),
    )
    plain = flops_per_token(spec, 0)
    per_layer = 8 * 8 + 2 * 4 * 8 + 8 * 8 + 2 * 16 * 8

    def extra(**parts):
        return flops_per_token(replace(spec, **parts), 0) - plain

    assert extra(recurrence=Recurrence(first=1, last=2, passes=3)) == 2 * 2 * 2 * per_layer
    assert extra(attention=replace(spec.attention, shared_kv=SharedKv())) == 0
    assert extra(bigram=HashEmbedding(num_buckets=30, dim=4)) == 2 * 8 * 4
    assert extra(value_embedding=ValueEmbedding(dim=5, last=2)) == 2 * 4 * 5
    assert extra(head=UntiedHead()) == 0
    assert extra(mtp=Mtp(num_heads=2)) == 2 * 2 * 10 * 8
