import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.blueprint import blueprint
from trainer.errors import InfeasibleError, UsageError
from trainer.finalize.code import write_code
from trainer.finalize.fit import Subject, fit
from trainer.finalize.pipeline import artifact_bytes
from trainer.finalize.plans import Prober, measured_plans, usual_plan
from trainer.finalize.quantize import quantize_tensors
from trainer.finalize.rate import curve, unit
from trainer.finalize.shares import (
    Share,
    allocate,
    dead_zone,
    factor_for,
    scaled,
    total_bits,
)
from trainer.finalize.shares import (
    settings as settings_of,
)
from trainer.finalize.stored import Quantized, restore
from trainer.finalize.trim import aimed_bits
from trainer.sizes import TensorSize, tensor_sizes
from trainer.specs.final import FinalSpec, Gptq, Quantize
from trainer.specs.model import Attention, HashEmbedding, ModelSpec

MODEL = ModelSpec(
    vocab_size=96,
    num_layers=2,
    dim=48,
    attention=Attention(num_heads=4, num_kv_heads=2),
    bigram=HashEmbedding(num_buckets=64, dim=16),
)
TENSORS = tensor_sizes(blueprint(MODEL))
INTEGERS = [tensor for tensor in TENSORS if tensor.role != "scalar"]
PARTS = ("embed", "attention", "mlp", "hash")


def weights(seed=0):
    """A state whose classes have different deviations, and whose rows differ within each."""
    generator = torch.Generator().manual_seed(seed)
    spread = {"embed": 0.4, "attention": 0.14, "mlp": 0.1, "hash": 0.5, "scalar": 1.0}
    state = {}
    for tensor in TENSORS:
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.role != "scalar":
            noise *= 0.5 + torch.rand(tensor.shape[0], 1, generator=generator)
        state[tensor.name] = spread[tensor.part] * noise
    return state


STATE = weights()


class Quadratic:
    """A loss that rises with the squared error of each class, at a rate of its own."""

    def __init__(self, rates, state=STATE):
        self.rates, self.state, self.calls = rates, state, 0

    def __call__(self, state):
        self.calls += 1
        loss = 3.0
        for tensor in INTEGERS:
            error = (state[tensor.name] - self.state[tensor.name]).double().square().sum()
            loss += self.rates.get(tensor.part, 1.0) * float(error)
        return loss


def curves_of(family="sd"):
    return {
        part: curve(unit(STATE, [t for t in INTEGERS if t.part == part], family)) for part in PARTS
    }


def loss_of(shares, costs):
    return sum(costs[n] * s.curve.error_at(s.relative) for n, s in shares.items())


@pytest.mark.parametrize("family", ["sd", "floor"])
@pytest.mark.parametrize("relative", [0.1, 0.4, 1.2])
def test_curve_is_what_quantizing_normal_rows_costs(family, relative):
    tensor = TensorSize("blocks.0.mlp.up.weight", (400, 256), "matrix", "mlp")
    rows = torch.linspace(0.05, 0.3, 400).unsqueeze(1)
    weight = rows * torch.randn(400, 256, generator=torch.Generator().manual_seed(0))
    one = curve(unit({tensor.name: weight}, [tensor], family))

    spec = settings_of({"mlp": Share(one, relative)}, Quantize(float_numel=0))
    stored, _ = quantize_tensors({tensor.name: weight}, [tensor], spec)

    form = stored[tensor.name]
    bits = sum(entropy(row) * 256 for row in form.q) + 16 * 400
    error = float((weight - restore(form)).double().square().sum())
    assert one.bits_at(relative) == pytest.approx(bits, rel=0.05)
    assert one.error_at(relative) == pytest.approx(error, rel=0.03)


def entropy(row):
    shares = torch.unique(row, return_counts=True)[1].double() / len(row)
    return -float(torch.xlogy(shares, shares).sum()) / math.log(2)


def test_steps_of_the_settings_are_those_of_the_shares():
    by_row = {part: Share(one, 0.3) for part, one in curves_of().items()}
    common = {"mlp": Share(curves_of("floor")["mlp"], 0.3)}

    for shares in (by_row, common):
        spec = settings_of(shares, Quantize(float_numel=0))
        stored, _ = quantize_tensors(STATE, TENSORS, spec)
        for share in shares.values():
            found = [stored[t.name].scale.float().numpy() for t in share.curve.unit.tensors]
            ratios = np.concatenate(found) / share.curve.unit.steps(0.3)
            assert float(np.median(ratios)) == pytest.approx(1.0, rel=1e-3)
            # A row too wide for its range takes a wider step.
            assert 0.998 < ratios.min() <= ratios.max() < 1.05


def test_range_is_the_narrowest_that_holds_the_rows():
    tensor = TensorSize("blocks.0.mlp.up.weight", (64, 256), "matrix", "mlp")
    noise = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    tailed = noise.clone()
    tailed[:, 0] = 12.0

    narrow, wide = (unit({tensor.name: weight}, [tensor]) for weight in (noise, tailed))

    assert [narrow.fewest_bits(step) for step in (0.04, 0.2, 0.5, 1.0, 4.0)] == [8, 6, 4, 3, 2]
    assert wide.fewest_bits(0.5) > narrow.fewest_bits(0.5)
    assert narrow.fewest_bits(0.02) is None


@settings(max_examples=25, deadline=None)
@given(
    logs=st.lists(st.floats(-6, 6), min_size=4, max_size=4),
    bits_per_weight=st.floats(1.5, 5.0),
    seed=st.integers(0, 99),
)
def test_no_other_sharing_of_the_same_bits_loses_less(logs, bits_per_weight, seed):
    curves = CURVES
    costs = dict(zip(PARTS, (2.0**log for log in logs), strict=True))
    budget = bits_per_weight * sum(one.unit.numel for one in curves.values())

    shares = allocate(curves, costs, budget)

    assert total_bits(shares) <= budget * (1 + 1e-6)
    steps = np.random.default_rng(seed).uniform(-0.5, 0.5, 4)
    if all(share.relative is not None for share in shares.values()):
        moved = {n: s.scaled(2.0**step) for (n, s), step in zip(shares.items(), steps, strict=True)}
        rival = scaled(moved, factor_for(moved, total_bits(shares)))
        assert loss_of(shares, costs) <= loss_of(rival, costs) * 1.005


CURVES = curves_of()


def test_class_that_costs_more_gets_finer_steps():
    costs = dict.fromkeys(PARTS, 1.0)
    budget = 4.0 * sum(one.unit.numel for one in CURVES.values())

    plain = allocate(CURVES, costs, budget)
    dear = allocate(CURVES, costs | {"embed": 100.0}, budget)

    assert dear["embed"].relative < plain["embed"].relative
    assert dear["mlp"].relative > plain["mlp"].relative
    assert total_bits(dear) == pytest.approx(total_bits(plain), rel=1e-3)


def test_budget_beyond_the_finest_grids_is_spent_on_float16():
    numel = sum(one.unit.numel for one in CURVES.values())

    shares = allocate(CURVES, dict.fromkeys(PARTS, 1.0), 20.0 * numel)

    assert all(share.relative is None for share in shares.values())
    spec = settings_of(shares, Quantize(float_numel=0))
    assert {getattr(spec.bits, part) for part in PARTS} == {16}


def test_dead_zone_pays_at_coarse_steps_only():
    draws = torch.randn(400_000, generator=torch.Generator().manual_seed(0)).double()

    def cost(step, edge):
        q = torch.round(torch.where(draws.abs() < edge * step, 0.0, draws) / step)
        return float((q * step - draws).square().mean()) * 4 ** entropy(q)

    assert dead_zone(0.3) is dead_zone(0.7) is None
    for step in (1.4, 2.0, 3.0):
        edge = dead_zone(step)
        assert edge is not None
        assert cost(step, edge) < 0.99 * cost(step, 0.5)


def test_aim_is_on_the_line_through_the_nearest_files():
    assert aimed_bits([(800.0, 100)], 90) == 720.0
    assert aimed_bits([(800.0, 100), (0.0, 1), (700.0, 90)], 95) == pytest.approx(750.0)


def test_measured_costs_are_those_of_the_loss():
    rates = {"embed": 0.5, "attention": 0.02, "mlp": 0.004, "hash": 0.3}

    rows, common = measured_plans(
        STATE, INTEGERS, Prober(STATE, Quantize(), Quadratic(rates), None)
    )

    assert rows.costs == pytest.approx(rates, rel=0.05)
    assert common.costs["embed"] == pytest.approx(rates["embed"], rel=0.05)
    assert common.curves["matrices"].unit.classes == ("mlp", "attention")
    assert rates["mlp"] < common.costs["matrices"] < rates["attention"]


def test_class_whose_error_costs_nothing_is_not_free():
    rates = dict.fromkeys(PARTS, 0.1) | {"hash": 0.0}

    rows, _ = measured_plans(STATE, INTEGERS, Prober(STATE, Quantize(), Quadratic(rates), None))

    assert 0.0 < rows.costs["hash"] < 0.01


def test_usual_plan_shares_out_the_usual_steps():
    plan = usual_plan(STATE, INTEGERS)
    budget = total_bits({n: Share(plan.curves[n], s) for n, s in plan_steps(plan).items()})

    shares = allocate(plan.curves, plan.costs, budget)

    found = {name: share.relative for name, share in shares.items()}
    assert found == pytest.approx(plan_steps(plan), rel=0.12)


def plan_steps(plan):
    usual = {"mlp": 0.35, "attention": 0.42, "embed": 0.16, "hash": 0.25}
    return {name: usual[name] for name in plan.curves}


@pytest.fixture(scope="module")
def code_bytes(tmp_path_factory):
    return write_code(tmp_path_factory.mktemp("code"), "zip").stat().st_size


@pytest.fixture
def fitted(tmp_path, code_bytes):
    """Fit the state to so many bytes of weights, the code left as a zip."""

    def run(weights_bytes, probe=None, folder="fit", hessians=None, **changes):
        final = replace(FinalSpec(), **changes)
        subject = Subject(STATE, MODEL, "ab" * 32, hessians)
        cap = code_bytes + weights_bytes
        return fit(subject, final, cap, tmp_path / folder, probe, keep={"code"}), cap

    return run


@pytest.mark.parametrize("weights_bytes", [15_000, 30_000, 45_000])
def test_artifact_lands_just_under_the_cap(fitted, tmp_path, weights_bytes):
    result, cap = fitted(weights_bytes)

    size = artifact_bytes(tmp_path / "fit")
    assert size == result.report.artifact_bytes
    assert 0.995 * cap <= size <= cap
    assert cap - size < 0.05 * weights_bytes
    assert result.choices["fills_cap"]
    assert len(result.choices["files"]) <= 9


def test_probe_turns_bits_to_the_class_that_needs_them(fitted):
    steps = {}
    for part in ("embed", "mlp"):
        rates = dict.fromkeys(PARTS, 0.01) | {part: 3.0}
        result, _ = fitted(30_000, Quadratic(rates), folder=part)
        stored, _ = quantize_tensors(STATE, TENSORS, result.final.quantize)
        steps[part] = {
            t.part: float(stored[t.name].scale.float().mean())
            for t in INTEGERS
            if isinstance(stored[t.name], Quantized)
        }

    assert steps["embed"].get("embed", 0.0) < steps["mlp"]["embed"]
    assert steps["mlp"].get("mlp", 0.0) < steps["embed"]["mlp"]


def test_fit_by_the_probe_loses_less_than_the_usual_steps(fitted):
    rates = {"embed": 0.001, "attention": 0.5, "mlp": 0.001, "hash": 0.2}
    usual, _ = fitted(25_000, folder="usual")

    measured, _ = fitted(25_000, Quadratic(rates), folder="measured")

    loss = Quadratic(rates)
    assert measured.choices["sensitivity"] == "measured"
    ours, theirs = (
        loss(
            {
                n: restore(f)
                for n, f in quantize_tensors(STATE, TENSORS, r.final.quantize)[0].items()
            }
        )
        for r in (measured, usual)
    )
    assert ours - 3.0 < 0.8 * (theirs - 3.0)


def test_the_same_fit_gives_the_same_bytes(fitted, tmp_path):
    loss = Quadratic(dict.fromkeys(PARTS, 0.1))
    one, _ = fitted(25_000, loss, folder="one")
    two, _ = fitted(25_000, loss, folder="two")

    assert one.final == two.final
    assert one.choices == two.choices
    names = [path.name for path in (tmp_path / "one").iterdir()]
    assert all(
        (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        for name in names
    )


def test_tight_cap_is_met_with_pruning(fitted):
    result, cap = fitted(5_000)

    assert result.report.artifact_bytes <= cap
    assert result.choices["prune"] > 0.3
    assert result.report.num_pruned > 0


def test_impossible_cap_names_the_smallest_size_reached(fitted, code_bytes):
    with pytest.raises(InfeasibleError) as error:
        fitted(600)

    smallest = int(str(error.value).partition("has ")[2].partition(" bytes")[0].replace(",", ""))
    assert code_bytes + 600 < smallest < code_bytes + 6_000


def test_model_too_small_for_its_cap_says_so(fitted):
    result, _ = fitted(10**6)

    assert result.choices["fills_cap"] is False
    assert result.choices["reason"] == "the finest grids of all tensors take no more"


def test_hessians_shape_the_fitted_artifact(fitted):
    generator = torch.Generator().manual_seed(2)
    hessians = {}
    for tensor in INTEGERS:
        if tensor.role == "matrix":
            width = tensor.shape[1]
            inputs = torch.randn(4 * width, width, generator=generator)
            inputs = inputs @ torch.randn(width, width, generator=generator)
            hessians[tensor.name] = inputs.T @ inputs / len(inputs)

    quantize = Quantize(gptq=Gptq())
    result, cap = fitted(25_000, Quadratic({}), hessians=hessians, quantize=quantize)

    methods = {record.name: record.method for record in result.report.tensors}
    assert all(methods[name] == "gptq" for name in hessians)
    assert 0.995 * cap <= result.report.artifact_bytes <= cap


def test_state_without_integers_cannot_be_fitted(tmp_path):
    final = FinalSpec(quantize=Quantize(float_numel=10**9))

    with pytest.raises(UsageError, match=r"^final\.quantize\.float_numel=1000000000 keeps every"):
        fit(
            Subject(STATE, MODEL, "ab" * 32), final, 10**6, tmp_path / "fit",
            keep={"float_numel", "code"},
        )  # fmt: skip
