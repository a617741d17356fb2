from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from tests import tiny
from tests.strategies import models
from trainer.blueprint import blueprint
from trainer.codec import parse
from trainer.finalize.artifact import write_weights
from trainer.finalize.prune import prune
from trainer.finalize.quantize import quantize_tensors
from trainer.model.build import build
from trainer.model.roles import roles_of
from trainer.sizes import (
    CONTAINER_FACTOR,
    bits_per_weight,
    flops_per_token,
    forecast_weights_bytes,
    num_params,
    tensor_sizes,
)
from trainer.specs.final import FinalSpec, Prune, Quantize
from trainer.specs.model import Attention, Mlp, ModelSpec
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
    assert bits_per_weight(bits, clip, row) == pytest.approx(entropy, abs=0.06)


@pytest.mark.parametrize("row", [64, 512, 2048])
def test_the_row_maximum_is_that_of_normal_draws(row):
    draws = torch.randn(4000, row, generator=torch.Generator().manual_seed(0))
    measured = float(draws.abs().amax(dim=1).mean())

    forecast = 31 / 2 ** (bits_per_weight(6, "none", row) - 2.047)

    assert forecast == pytest.approx(measured, rel=0.02)


def written_bytes(final, path):
    """Write Gaussian weights as an artifact and return the file's size."""
    generator = torch.Generator().manual_seed(0)
    sizes = tensor_sizes(blueprint(MODEL))
    state = {t.name: 0.1 * torch.randn(t.shape, generator=generator) for t in sizes}
    if final.prune is not None:
        for tensor in sizes:
            if tensor.role == "matrix" and tensor.numel > final.quantize.float_numel:
                state[tensor.name] = prune(state[tensor.name], final.prune.ratio)
    roles = {tensor.name: tensor.role for tensor in sizes}
    stored, _ = quantize_tensors(state, roles, final.quantize)
    return write_weights(path, MODEL, stored, final.compress, "ab" * 32)


@pytest.mark.parametrize(
    "final",
    [
        FinalSpec(quantize=Quantize(matrix_bits=bits, clip=clip, float_numel=4096), prune=pruned)
        for bits, clip, pruned in (
            (6, "none", None),
            (4, "p5", None),
            (6, "sd12.85", None),
            (8, "none", Prune(ratio=0.05)),
            (6, "none", Prune(ratio=0.3)),
        )
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
    assert forecast == round(CONTAINER_FACTOR * floats)


def test_fewer_bits_and_more_pruning_forecast_fewer_bytes():
    def forecast(bits, ratio):
        quantize = Quantize(matrix_bits=bits, float_numel=4096)
        return forecast_weights_bytes(MODEL, FinalSpec(quantize=quantize, prune=Prune(ratio=ratio)))

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
