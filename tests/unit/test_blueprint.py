import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from trainer.blueprint import Step, blueprint
from trainer.specs.model import Attention, Mlp, Rope, UNetSkips


def unet(num_layers):
    return blueprint(tiny.bare_model(num_layers=num_layers, unet=UNetSkips()))


def test_an_even_depth_pairs_every_layer():
    plan = unet(4)

    assert plan.steps == (Step(0, push=True), Step(1, push=True), Step(2, pop=0), Step(3, pop=1))
    assert plan.num_skips == 2


def test_an_odd_depth_leaves_the_last_layer_without_a_skip():
    plan = unet(5)

    assert plan.steps[2:] == (Step(2, pop=0), Step(3, pop=1), Step(4))
    assert plan.num_skips == 2


def test_one_layer_has_no_skip():
    assert unet(1).num_skips == 0


@given(st.integers(1, 40))
def test_every_push_is_popped_once_and_every_layer_runs_once(num_layers):
    plan = unet(num_layers)

    stack, popped = [], []
    for step in plan.steps:
        if step.pop is not None:
            stack.pop()
            popped.append(step.pop)
        if step.push:
            stack.append(step.layer)
    assert stack == []
    assert popped == list(range(plan.num_skips))
    assert [step.layer for step in plan.steps] == list(range(num_layers))


def test_without_skips_the_layers_only_run():
    assert blueprint(tiny.bare_model()).steps == (Step(0), Step(1))


@pytest.mark.parametrize(("dims", "rotated"), [(None, 16), (4, 4)])
def test_rope_turns_the_whole_head_unless_told(dims, rotated):
    attention = Attention(num_heads=2, num_kv_heads=1, rope=Rope(dims=dims))

    assert blueprint(tiny.bare_model(attention=attention)).rope_dims == rotated


def test_widths_follow_from_heads_and_mult():
    plan = blueprint(
        tiny.bare_model(
            dim=48, attention=Attention(num_heads=4, num_kv_heads=2), mlp=Mlp(mult=2.51)
        )
    )

    assert (plan.head_dim, plan.kv_dim, plan.mlp_dim) == (12, 24, 120)
