"""The public names of our parameters, and what a file's tensors say about the recipe."""

from dataclasses import replace

import pytest

from tests import golden_pr414, tiny
from trainer.blueprint import blueprint
from trainer.errors import UsageError
from trainer.importer.hints import settings_for_part, settings_for_shape
from trainer.importer.names import common_prefix, public_tensors, shared_copies
from trainer.importer.unseen import unseen
from trainer.sizes import tensor_sizes
from trainer.specs.model import (
    Attention,
    DtgGate,
    HashEmbedding,
    LnScale,
    Mlp,
    ModelSpec,
    Mtp,
    Recurrence,
    SharedKv,
    SmearV1,
    SmearV2,
    SwiGlu,
    UntiedHead,
    ValueEmbedding,
    Xsa,
)


def shapes_of(spec):
    return {tensor.name: tensor.shape for tensor in public_tensors(blueprint(spec))}


def test_names_are_those_that_the_pr414_script_wrote():
    plan = blueprint(golden_pr414.model_spec())

    found = {tensor.name: tensor.ours for tensor in public_tensors(plan)}

    assert found == golden_pr414.our_names()


def test_shapes_are_those_that_the_pr414_script_wrote():
    written = {name: tuple(t.shape) for name, t in golden_pr414.public_state().items()}

    assert shapes_of(golden_pr414.model_spec()) == written


@pytest.mark.parametrize("smear", [None, SmearV1(), SmearV2(width=6)])
def test_every_parameter_of_the_richest_model_has_a_public_name_of_its_own(smear):
    plan = blueprint(tiny.rich_model(smear=smear, ln_scale=LnScale()))

    found = public_tensors(plan)

    assert [tensor.ours for tensor in found] == [size.name for size in tensor_sizes(plan)]
    assert len({tensor.name for tensor in found}) == len(found)


def test_a_one_row_gate_has_one_more_axis_in_public():
    shapes = shapes_of(tiny.full_model(dtg=DtgGate()))

    assert shapes["blocks.0.dtg_gate.weight"] == (1, 32)
    assert shapes["blocks.0.dtg_gate.bias"] == (1,)


def test_value_scales_are_numbered_by_the_layers_that_use_them():
    spec = tiny.full_model(value_embedding=ValueEmbedding(dim=8, last=2))

    found = {t.name: t.ours for t in public_tensors(blueprint(spec)) if "ve_layer" in t.name}

    assert found == {
        "ve_layer_scales.0": "blocks.1.attention.value_mix.scale",
        "ve_layer_scales.1": "blocks.2.attention.value_mix.scale",
    }


def test_a_learned_norm_scale_has_no_public_name():
    plan = blueprint(tiny.full_model(ln_scale=LnScale(learned=True)))

    with pytest.raises(UsageError, match=r"norm_scale\.scale: no public script has such"):
        public_tensors(plan)


def test_shared_matrices_may_be_repeated_under_the_names_of_the_layers_that_share_them():
    shared = Attention(num_heads=4, num_kv_heads=2, shared_kv=SharedKv(last=1))

    copies = shared_copies(blueprint(tiny.full_model(attention=shared)))

    assert copies == {
        "blocks.2.attn.c_k.weight": "blocks.1.attn.c_k.weight",
        "blocks.2.attn.c_v.weight": "blocks.1.attn.c_v.weight",
    }


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        (["module.a", "module.b"], "module."),
        (["module._orig_mod.a", "module._orig_mod.b"], "module._orig_mod."),
        (["module.a", "b"], ""),
        ([], ""),
    ],
)
def test_a_prefix_is_what_all_names_carry(names, prefix):
    assert common_prefix(names) == prefix


BASE = tiny.full_model(bigram=HashEmbedding(num_buckets=32, dim=8))


@pytest.mark.parametrize(
    ("tensor", "shape", "settings"),
    [
        ("bigram.embed.weight", (64, 8), ("model.bigram.num_buckets=64",)),
        ("bigram.embed.weight", (32, 4), ("model.bigram.dim=4",)),
        ("tok_emb.weight", (80, 32), ("model.vocab_size=80",)),
        ("tok_emb.weight", (64, 48), ("model.dim=48",)),
        (
            "blocks.0.attn.q_gain",
            (2,),
            ("model.attention.num_heads=2", "model.attention.num_kv_heads=1"),
        ),
        ("blocks.0.attn.c_k.weight", (8, 32), ("model.attention.num_kv_heads=1",)),
        ("blocks.0.mlp.fc.weight", (96, 32), ("model.mlp.mult=3",)),
        ("blocks.0.mlp.proj.weight", (32, 96), ("model.mlp.mult=3",)),
        ("blocks.0.mlp.fc.weight", (64, 32, 1), ()),
        # What no recipe can be, or one tensor alone says of all.
        ("tok_emb.weight", (0, 32), ()),
        ("bigram.embed.weight", (1, 8), ()),
        ("skip_weights", (1, 7), ()),
        ("blocks.0.attn_scale", (7,), ()),
    ],
)
def test_a_wrong_shape_names_the_field_that_sets_it(tensor, shape, settings):
    wanted = next(t for t in public_tensors(blueprint(BASE)) if t.name == tensor)

    assert settings_for_shape(wanted, shapes_of(BASE) | {tensor: shape}, BASE) == settings


def without(spec: ModelSpec, *paths: str) -> ModelSpec:
    return replace(spec, **dict.fromkeys(paths))


SHARED = Attention(num_heads=4, num_kv_heads=2, shared_kv=SharedKv())


@pytest.mark.parametrize(
    ("file", "recipe", "tensor", "settings"),
    [
        (replace(BASE, num_layers=5), BASE, "blocks.4.attn_scale", "model.num_layers=5"),
        (BASE, replace(BASE, num_layers=5), "blocks.3.mlp.fc.weight", "model.num_layers=3"),
        (BASE, without(BASE, "bigram"), "bigram.scale", "model.bigram.num_buckets=32"),
        (without(BASE, "bigram"), BASE, "bigram.scale", "model.bigram=null"),
        (BASE, without(BASE, "unet"), "skip_weights", "model.unet={}"),
        (without(BASE, "unet"), BASE, "skip_weights", "model.unet=null"),
        (without(BASE, "x0_mix"), BASE, "blocks.0.resid_mix", "model.x0_mix=null"),
        (replace(BASE, smear=SmearV2()), BASE, "smear_lambda", "model.smear.kind=v2"),
        (BASE, replace(BASE, smear=SmearV1()), "smear.gate", "model.smear=null"),
        (BASE, replace(BASE, head=UntiedHead()), "lm_head.weight", "model.head=null"),
        (replace(BASE, mtp=Mtp(num_heads=2)), BASE, "mtp_heads.1.weight", "model.mtp.num_heads=2"),
        (BASE, replace(BASE, mtp=Mtp()), "mtp_heads.0.weight", "model.mtp=null"),
        (
            replace(BASE, attention=SHARED),
            BASE,
            "blocks.1.attn.c_k.weight",
            "model.attention.shared_kv={}",
        ),
    ],
)
def test_a_missing_or_extra_tensor_names_the_field_of_its_part(file, recipe, tensor, settings):
    assert settings_for_part(tensor, shapes_of(file), recipe)[0] == settings


def test_a_tensor_that_the_recipe_has_but_the_file_lost_names_no_field():
    shapes = shapes_of(BASE)
    del shapes["blocks.1.mlp.fc.weight"]

    assert settings_for_part("blocks.1.mlp.fc.weight", shapes, BASE) == ()


@pytest.mark.parametrize("layer", ["99999", "7" * 5000])
def test_a_layer_that_stands_alone_is_no_depth(layer):
    name = f"blocks.{layer}.attn_scale"

    assert settings_for_part(name, shapes_of(BASE) | {name: (32,)}, BASE) == ()


def test_a_smaller_depth_takes_along_what_counts_layers():
    attention = Attention(num_heads=4, num_kv_heads=2, xsa=Xsa(last=5), shared_kv=SharedKv(last=2))
    deep = replace(
        BASE,
        num_layers=6,
        attention=attention,
        value_embedding=ValueEmbedding(dim=8, last=4),
        recurrence=Recurrence(first=3, last=4),
    )
    file = replace(BASE, value_embedding=ValueEmbedding(dim=8, last=1))

    assert settings_for_part("blocks.5.mlp.fc.weight", shapes_of(file), deep) == (
        "model.num_layers=3",
        "model.attention.xsa.last=3",
        "model.value_embedding.last=1",
        "model.attention.shared_kv=null",
        "model.recurrence=null",
    )


@pytest.mark.parametrize(("hidden", "dim"), [(1000, 384), (1365, 512), (2047, 768), (29, 100)])
def test_a_hinted_mult_gives_the_hidden_width_to_the_unit(hidden, dim):
    heads = Attention(num_heads=2, num_kv_heads=1)
    spec = replace(BASE, dim=dim, attention=heads)
    wanted = next(t for t in public_tensors(blueprint(spec)) if t.name == "blocks.0.mlp.fc.weight")
    shapes = shapes_of(spec) | {wanted.name: (hidden, dim)}

    (setting,) = settings_for_shape(wanted, shapes, spec)

    assert int(float(setting.removeprefix("model.mlp.mult=")) * dim) == hidden


def test_what_no_tensor_tells_is_named_with_its_value():
    assert unseen(golden_pr414.model_spec()) == {
        "model.mlp.activation.kind": "relu2",
        "model.attention.rope.dims": 16,
        "model.attention.rope.base": 10_000.0,
        "model.attention.rope.ntk_reference": 1024,
        "model.attention.xsa.last": 3,
        "model.ln_scale.learned": False,
        "model.recurrence": "null",
        "model.softcap.cap": 30.0,
        "model.smear.before_norm": False,
    }


def test_heads_without_a_gain_are_taken_on_trust_and_a_gated_mlp_is_not():
    found = unseen(tiny.bare_model(mlp=Mlp(activation=SwiGlu())))

    assert found["model.attention.num_heads"] == 2
    assert found["model.attention.xsa"] == "null"
    assert "model.mlp.activation.kind" not in found
