"""Combinations that cannot be built are refused before anything is, each in one clear line."""

import pytest

from tests import tiny
from trainer.codec import parse
from trainer.errors import UsageError
from trainer.specs.recipe import Recipe


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"model.attention.xsa.last": 3}, "model: attention.xsa.last=3 exceeds num_layers=2"),
        ({"model.attention.xsa.last": 0}, "model.attention.xsa: last=0 must be above 0"),
        ({"model.value_embedding.last": 3}, "model: value_embedding.last=3 exceeds num_layers=2"),
        (
            {"model.num_layers": 3, "model.attention.shared_kv.last": 2},
            "model: attention.shared_kv.last=2 needs as many layers before the sharing ones; "
            "num_layers=3",
        ),
        (
            {"model.num_layers": 1, "model.unet": None, "model.attention.shared_kv": {}},
            "model: attention.shared_kv needs as many layers before the sharing ones; num_layers=1",
        ),
        (
            {"model.recurrence": {"first": 1, "last": 2}},
            "model: recurrence.last=2 is not a layer below num_layers=2",
        ),
        (
            {"model.recurrence": {"first": 1, "last": 0}},
            "model.recurrence: first=1 is not within 0..last=0",
        ),
        (
            {"model.recurrence": {"first": 0, "last": 1, "passes": 1}},
            "model.recurrence: passes=1 must be at least 2",
        ),
        (
            {"model.num_layers": 1},
            "model: unet needs two layers to hand a skip over; remove it or set num_layers=2",
        ),
        (
            {"model.attention.rope.dims": 2, "model.attention.rope.ntk_reference": 16},
            "model: attention.rope.ntk_reference needs more than 2 rotated dimensions",
        ),
        (
            {"model.smear": {"kind": "v2", "width": 33}},
            "model: smear.width=33 exceeds dim=32",
        ),
        (
            {"model.smear": {"kind": "v2", "bos": 320}},
            "model: smear.bos=320 is no token of vocab_size=320",
        ),
        (
            {"model.bigram": {"num_buckets": 1, "dim": 8}},
            "model.bigram: num_buckets=1 must be at least 2",
        ),
        (
            {"model.mlp.activation": {"kind": "relu_power", "power": 0.5}},
            "model.mlp.activation: power=0.5 is below 1",
        ),
        (
            {"model.mtp.num_heads": 32},
            "model.mtp.num_heads=32 looks past the end of train.seq_len=32",
        ),
        (
            {"final.quantize.float16_keys": [2]},
            "final.quantize.float16_keys: layer 2 has no key projection of its own, "
            "layers 0..1 have; set final.quantize.float16_keys=[]",
        ),
        (
            {"model.attention.shared_kv": {}, "final.quantize.float16_keys": [1]},
            "final.quantize.float16_keys: layer 1 has no key projection of its own, "
            "layers 0..0 have; set final.quantize.float16_keys=[]",
        ),
        (
            {
                "train.qat": {"mlp_bits": 6, "start": {"lr_scale": 0.1}},
                "train.schedule.warmdown_iters": 0,
                "train.averages.swa": None,
            },
            "train: qat.start.lr_scale=0.1 is never reached: the schedule has no warmdown below it",
        ),
        (
            {"train.qat": {"mlp_bits": 6, "start": {"lr_scale": 0.1, "progress": 0.5}}},
            "train.qat.start: give either lr_scale or progress",
        ),
        (
            {"train.qat": {"other_bits": 6}},
            "train.qat.other_bits=6 alone reaches no matrix of this model; set mlp_bits or "
            "attention_bits, or leave train.qat out",
        ),
        (
            {"train.averages.ema_every": 13},
            "train: averages.ema_every=13 exceeds iterations=12: no shadow would ever move",
        ),
        ({"train.qat": {}}, "train.qat: give bits to one of mlp_bits, attention_bits, other_bits"),
        ({"train.qat.mlp_bits": 9}, "train.qat: mlp_bits=9 is outside 2..8"),
        (
            {"train.schedule.warmdown_fraction": 0.5},
            "train.schedule: warmdown_iters=4 beside warmdown_fraction=0.5: set one to 0 or null",
        ),
        (
            {"train.optimizer.matrix": {"coefficients": "polar_express", "ns_steps": 6}},
            "train.optimizer.matrix: ns_steps=6: polar_express has coefficients for 5 steps",
        ),
    ],
)
def test_an_impossible_combination_is_refused_in_one_line(values, line):
    with pytest.raises(UsageError) as caught:
        tiny.recipe(values)

    assert str(caught.value) == f"micro: {line}"


def test_an_unknown_part_is_answered_with_the_nearest_one():
    with pytest.raises(UsageError, match="did you mean bigram"):
        parse(Recipe, tiny.recipe_data({"model.bigramm.dim": 3}), "micro")
