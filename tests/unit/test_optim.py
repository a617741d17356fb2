import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests import tiny
from tests.reference.muon_reference import POLAR_EXPRESS, QUINTIC, PlainMuon, orthogonalise
from trainer.model.build import build
from trainer.model.roles import roles_of
from trainer.optim.groups import Optimizers
from trainer.optim.muon import Muon, momentum_at, newton_schulz, triples
from trainer.specs import train as specs


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def take_steps(model, optimizers, first, last):
    """Train on a fixed batch per step, so that two models see the same."""
    for step in range(first, last):
        tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(step))
        model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
        optimizers.step(step, 1.0)


SINGULAR = (0.01, 0.05, 0.1, 0.3, 0.5, 1.0)


@pytest.mark.parametrize(
    ("coefficients", "published"),
    [
        ("quintic", (0.699, 0.758, 0.712, 1.080, 0.765, 0.696)),
        ("polar_express", (1.027, 0.909, 1.059, 0.983, 0.911, 0.859)),
    ],
)
def test_newton_schulz_maps_singular_values_as_published(coefficients, published):
    # A second value fills the Frobenius norm to 1, so that the division leaves the first alone.
    s = torch.tensor(SINGULAR, dtype=torch.float64)
    stack = torch.diag_embed(torch.stack([s, (1 - s**2).sqrt()], dim=1))

    out = newton_schulz(stack, triples(specs.Muon(coefficients=coefficients)), torch.float64)

    assert out[:, 0, 0].tolist() == pytest.approx(published, abs=6e-4)


@pytest.mark.parametrize(("coefficients", "table"), [("quintic", QUINTIC),
                                                     ("polar_express", POLAR_EXPRESS)])  # fmt: skip
@pytest.mark.parametrize("shape", [(6, 6), (4, 10), (10, 4)])
def test_newton_schulz_of_a_stack_is_the_plain_twins_of_each(shape, coefficients, table):
    stack = draw(3, *shape).double()

    out = newton_schulz(stack, triples(specs.Muon(coefficients=coefficients)), torch.float64)

    for matrix, found in zip(stack, out, strict=True):
        torch.testing.assert_close(found, orthogonalise(matrix, table))


def test_fewer_newton_schulz_steps_take_the_first_coefficients():
    spec = specs.Muon(coefficients="polar_express", ns_steps=3)

    assert triples(spec) == POLAR_EXPRESS[:3]
    assert triples(specs.Muon(ns_steps=7)) == QUINTIC[:1] * 7


@pytest.mark.parametrize(
    ("coefficients", "table", "weight_decay"),
    [("quintic", QUINTIC, 0.0), ("quintic", QUINTIC, 0.1), ("polar_express", POLAR_EXPRESS, 0.1)],
)
def test_muon_is_the_plain_twin_over_several_steps(coefficients, table, weight_decay):
    spec = specs.Muon(
        lr=0.03, weight_decay=weight_decay, momentum_warmup_steps=3, coefficients=coefficients
    )
    starts = [draw(8, 8), draw(8, 8, seed=1), draw(12, 4, seed=2), draw(4, 12, seed=3)]
    parameters = [nn.Parameter(start.clone()) for start in starts]
    twins = [PlainMuon(start, spec.lr, weight_decay, table) for start in starts]
    muon = Muon(parameters, spec)

    for step, lr_scale in enumerate((1.0, 1.0, 0.5, 0.25)):
        muon.param_groups[0] |= {"lr": spec.lr * lr_scale, "momentum": momentum_at(spec, step)}
        for i, (parameter, twin) in enumerate(zip(parameters, twins, strict=True)):
            parameter.grad = draw(*parameter.shape, seed=10 * step + i)
            twin.step(parameter.grad, momentum_at(spec, step), lr_scale)
        muon.step()

    for parameter, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(parameter.detach().double(), twin.weight, rtol=0, atol=1e-5)


def test_newton_schulz_can_be_asked_to_run_in_half_precision():
    def move_of(dtype):
        parameter = nn.Parameter(torch.zeros(8, 8))
        parameter.grad = draw(8, 8)
        Muon([parameter], specs.Muon(lr=1.0, ns_dtype=dtype)).step()
        return parameter.detach()

    full, halved = move_of("float32"), move_of("bfloat16")

    assert torch.equal(full, move_of(None))  # what a CPU takes by itself
    assert torch.equal(halved, halved.bfloat16().float())
    assert 0 < float((halved - full).abs().max()) < 0.05


def test_a_matrix_without_gradient_only_decays():
    parameter = nn.Parameter(torch.ones(4, 4))
    muon = Muon([parameter], specs.Muon(lr=0.5, weight_decay=0.1))

    muon.step()

    torch.testing.assert_close(parameter.detach(), torch.full((4, 4), 0.95))


def test_the_shares_of_a_gang_add_up_to_the_whole_in_the_products_dtype(monkeypatch):
    sent, waits = [], []

    class Reduction:
        def wait(self):
            waits.append(len(sent))

    def all_reduce(tensor, async_op):
        assert async_op
        sent.append(tensor)
        return Reduction()

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    shapes = [(8, 8), (12, 4), (8, 8), (8, 8)]
    spec = specs.Muon(ns_dtype="bfloat16", momentum_start=0.0, momentum_warmup_steps=9)
    for rank in (0, 1):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        for i, parameter in enumerate(parameters):
            parameter.grad = draw(*parameter.shape, seed=i)
        Muon(parameters, spec).step()

    # Each rank sends one stack of a shape, then the next, and only then waits for either.
    assert waits == [2, 2, 4, 4]
    assert {tensor.dtype for tensor in sent} == {torch.bfloat16}
    squares = torch.stack([draw(8, 8, seed=i) for i in (0, 2, 3)])
    whole = newton_schulz(squares, triples(spec), torch.bfloat16)
    torch.testing.assert_close(sent[0] + sent[2], whole, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("step", "momentum"), [(0, 0.85), (125, 0.875), (250, 0.90), (500, 0.95), (9000, 0.95)]
)
def test_momentum_warms_up_linearly_and_stays(step, momentum):
    assert momentum_at(specs.Muon(), step) == pytest.approx(momentum)


def test_without_warmup_the_momentum_is_final_at_once():
    assert momentum_at(specs.Muon(momentum_warmup_steps=0), 0) == pytest.approx(0.95)


MODELS = pytest.mark.parametrize(
    "spec",
    [tiny.rich_model(), tiny.full_model(), tiny.bare_model()],
    ids=["rich", "full", "bare"],
)


@MODELS
def test_every_parameter_is_in_the_one_optimizer_of_its_role(spec):
    model = build(spec, seed=0)
    optimizers = Optimizers(model, specs.Optimizer())

    held = [
        (id(parameter), role)
        for role, optimizer in optimizers.by_role.items()
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]

    roles = roles_of(model)
    declared = [(id(parameter), roles[name]) for name, parameter in model.named_parameters()]
    assert sorted(held) == sorted(declared)


@pytest.mark.parametrize(
    ("spec", "num_steps"),
    # A head from zero passes no gradient down in the first step, a branch's end none in the next.
    [(tiny.rich_model(), 3), (tiny.full_model(), 2), (tiny.bare_model(), 2)],
    ids=["rich", "full", "bare"],
)
def test_every_parameter_soon_has_a_gradient_and_has_moved(spec, num_steps):
    model = build(spec, seed=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = Optimizers(model, specs.Optimizer())
    take_steps(model, optimizers, 0, num_steps - 1)
    tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(5))

    model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
    without = {name for name, p in model.named_parameters() if not p.grad.any()}
    optimizers.step(num_steps - 1, 1.0)

    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert (without, still) == (set(), set())


def test_each_role_has_its_own_rate_and_decay_scaled_together():
    model = build(tiny.rich_model(), seed=0)
    spec = specs.Optimizer(
        matrix=specs.Muon(lr=0.3, momentum_start=0.5, momentum_warmup_steps=10),
        embed=specs.AdamW(lr=0.2, beta1=0.8, beta2=0.7, eps=1e-6, weight_decay=0.01),
        scalar=specs.AdamW(lr=0.1),
        head=specs.AdamW(lr=0.4, beta1=0.6),
    )
    optimizers = Optimizers(model, spec)

    optimizers.step(10, 0.5)

    groups = {role: optimizer.param_groups[0] for role, optimizer in optimizers.by_role.items()}
    assert {role: group["lr"] for role, group in groups.items()} == {
        "matrix": 0.15,
        "embed": 0.1,
        "scalar": 0.05,
        "head": 0.2,
    }
    assert groups["matrix"]["momentum"] == 0.95
    assert (groups["embed"]["betas"], groups["embed"]["eps"]) == ((0.8, 0.7), 1e-6)
    assert groups["embed"]["weight_decay"] == 0.01
    assert groups["head"]["betas"] == (0.6, 0.95)


def test_at_rate_zero_nothing_moves_and_gradients_are_cleared():
    model = build(tiny.full_model(), seed=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = Optimizers(model, specs.Optimizer(matrix=specs.Muon(weight_decay=0.1)))
    tokens = torch.zeros(1, 4, dtype=torch.int64)

    model(tokens, tokens).mean().backward()
    optimizers.step(0, 0.0)

    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_clip_bounds_the_norm_over_all_parameters():
    model = build(tiny.rich_model(), seed=0)
    optimizers = Optimizers(model, specs.Optimizer(grad_clip=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)

    optimizers.step(0, 1.0)

    # After one step AdamW's first moment is 0.1 of the clipped gradient, Muon's is all of it.
    squares = 0.0
    for role, optimizer in optimizers.by_role.items():
        name, scale = ("momentum_buffer", 1.0) if role == "matrix" else ("exp_avg", 10.0)
        for state in optimizer.state.values():
            squares += float((scale * state[name]).square().sum())
    assert squares**0.5 == pytest.approx(0.5, rel=1e-3)


def test_a_restored_optimizer_goes_on_to_the_same_bits():
    straight, resumed = (build(tiny.full_model(), seed=0) for _ in range(2))
    ahead, first = (Optimizers(model, specs.Optimizer()) for model in (straight, resumed))
    take_steps(straight, ahead, 0, 4)
    take_steps(resumed, first, 0, 2)

    second = Optimizers(resumed, specs.Optimizer())
    second.load_state_dict(first.state_dict())
    take_steps(resumed, second, 2, 4)

    pairs = zip(straight.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def states_of(optimizers):
    return [
        tensor
        for optimizer in optimizers.by_role.values()
        for state in optimizer.state.values()
        for tensor in state.values()
    ]


def test_a_state_is_loaded_into_the_tensors_that_there_are():
    model = build(tiny.full_model(), seed=0)
    optimizers = Optimizers(model, specs.Optimizer())
    take_steps(model, optimizers, 0, 1)
    before, saved = states_of(optimizers), copy.deepcopy(optimizers.state_dict())
    values = [tensor.clone() for tensor in before]
    take_steps(model, optimizers, 1, 3)

    optimizers.load_state_dict(saved)

    after = states_of(optimizers)
    assert all(one is other for one, other in zip(before, after, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(after, values, strict=True))


def test_a_state_that_was_saved_on_another_kind_of_device_goes_on_as_this_ones():
    straight, resumed = (build(tiny.full_model(), seed=0) for _ in range(2))
    ahead, first = (Optimizers(model, specs.Optimizer()) for model in (straight, resumed))
    take_steps(straight, ahead, 0, 4)
    take_steps(resumed, first, 0, 2)
    saved = copy.deepcopy(first.state_dict())
    for group in (saved[role]["param_groups"][0] for role in ("embed", "scalar")):
        group["fused"] = True  # as on a GPU

    second = Optimizers(resumed, specs.Optimizer())
    second.load_state_dict(saved)
    take_steps(resumed, second, 2, 4)

    groups = [group for each in second.by_role.values() for group in each.param_groups]
    assert not any(group.get("fused") for group in groups)
    pairs = zip(straight.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_steps_that_are_rolled_back_to_a_fresh_optimizer_leave_no_trace():
    rolled, fresh = (build(tiny.full_model(), seed=0) for _ in range(2))
    ahead, first = (Optimizers(model, specs.Optimizer()) for model in (rolled, fresh))
    before = copy.deepcopy((rolled.state_dict(), ahead.state_dict()))
    take_steps(rolled, ahead, 5, 8)

    rolled.load_state_dict(before[0])
    ahead.load_state_dict(before[1])
    take_steps(rolled, ahead, 0, 3)
    take_steps(fresh, first, 0, 3)

    pairs = zip(rolled.parameters(), fresh.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_muon_takes_its_rates_as_tensors_too():
    spec = specs.Muon(lr=0.03, weight_decay=0.1)
    ends = []
    for kind in (float, torch.tensor):
        parameters = [nn.Parameter(draw(8, 8)), nn.Parameter(draw(12, 4, seed=2))]
        muon = Muon(parameters, spec)
        muon.param_groups[0] |= {"lr": kind(0.02), "momentum": kind(0.9)}
        for step in range(2):
            for parameter in parameters:
                parameter.grad = draw(*parameter.shape, seed=step)
            muon.step()
        ends.append(parameters)

    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_an_untied_head_moves_at_its_own_small_rate():
    groups = Optimizers(build(tiny.rich_model()), specs.Optimizer()).by_role["head"].param_groups

    assert [group["lr"] for group in groups] == [0.008]
