import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from trainer.blueprint import Step, blueprint
from trainer.specs.model import (
    Attention,
    LnScale,
    Mlp,
    Recurrence,
    Rope,
    SharedKv,
    UNetSkips,
    ValueEmbedding,
    Xsa,
)


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


@given(st.integers(2, 40))
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


def test_a_recurrent_stretch_is_visited_again_and_split_where_the_visits_halve():
    plan = blueprint(
        tiny.bare_model(
            num_layers=11, unet=UNetSkips(), recurrence=Recurrence(first=3, last=5, passes=3)
        )
    )

    encoder = [step.layer for step in plan.steps if step.push]
    decoder = [step.layer for step in plan.steps if not step.push]

    assert encoder == [0, 1, 2, 3, 4, 5, 3, 4]
    assert decoder == [5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert plan.num_skips == 8


def test_parts_of_the_last_layers_are_counted_from_the_end():
    attention = Attention(num_heads=2, num_kv_heads=1, xsa=Xsa(last=4))
    plan = blueprint(
        tiny.bare_model(num_layers=11, attention=attention, value_embedding=ValueEmbedding(last=2))
    )

    assert [layer.index for layer in plan.layers if layer.has_xsa] == [7, 8, 9, 10]
    assert [layer.index for layer in plan.layers if layer.uses_value_embedding] == [9, 10]


def test_exclusive_attention_without_a_number_is_in_every_layer():
    attention = Attention(num_heads=2, num_kv_heads=1, xsa=Xsa())

    plan = blueprint(tiny.bare_model(num_layers=3, attention=attention))

    assert all(layer.has_xsa for layer in plan.layers)


@pytest.mark.parametrize(
    ("last", "owners"), [(None, [0, 0, 0, 0, 0, 0]), (2, [0, 1, 2, 3, 2, 3]), (3, [0, 1, 2] * 2)]
)
def test_each_layer_knows_whose_keys_and_values_it_uses(last, owners):
    attention = Attention(num_heads=2, num_kv_heads=1, shared_kv=SharedKv(last=last))

    plan = blueprint(tiny.bare_model(num_layers=6, attention=attention))

    assert [layer.kv_owner for layer in plan.layers] == owners


def test_the_ln_scale_falls_with_the_root_of_the_depth():
    plan = blueprint(tiny.bare_model(num_layers=4, ln_scale=LnScale()))

    assert [layer.norm_scale for layer in plan.layers] == [1.0, 2**-0.5, 3**-0.5, 0.5]
