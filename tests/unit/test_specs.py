from dataclasses import FrozenInstanceError, replace

import pytest

from tests import tiny
from trainer.codec import dump, fingerprint, parse
from trainer.errors import UsageError
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.final import sd_clip
from trainer.specs.recipe import Observe, Recipe
from trainer.specs.task import final_task, train_task
from trainer.specs.train import Averages, ema_entry


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"model.vocab_size": 0}, "model: vocab_size=0 must be above 0"),
        ({"model.num_layers": 0}, "model: num_layers=0 must be above 0"),
        ({"model.dim": 0}, "model: dim=0 must be above 0"),
        ({"model.dim": 33}, "model: attention.num_heads=2 does not divide dim=33"),
        ({"model.dim": 6}, "model: the head width 3 must be even"),
        (
            {"model.attention.rope.dims": 18},
            "model: attention.rope.dims=18 exceeds the head width 16",
        ),
        ({"model.mlp.mult": 0.01}, "model: mlp.mult=0.01 leaves no hidden unit at dim=32"),
        ({"model.embedding.init_std": 0.0}, "model.embedding: init_std=0.0 must be above 0"),
        ({"model.attention.rope.dims": 0}, "model.attention.rope: dims=0 must be above 0"),
        ({"model.attention.rope.dims": 3}, "model.attention.rope: dims=3 must be even"),
        ({"model.attention.rope.base": -1.0}, "model.attention.rope: base=-1.0 must be above 0"),
        ({"model.attention.num_heads": 0}, "model.attention: num_heads=0 must be above 0"),
        ({"model.attention.num_kv_heads": 0}, "model.attention: num_kv_heads=0 must be above 0"),
        (
            {"model.attention.num_heads": 4, "model.attention.num_kv_heads": 3},
            "model.attention: num_kv_heads=3 must divide num_heads=4",
        ),
        ({"model.mlp.mult": 0.0}, "model.mlp: mult=0.0 must be above 0"),
        ({"model.softcap.cap": 0.0}, "model.softcap: cap=0.0 must be above 0"),
        ({"train.iterations": 0}, "train: iterations=0 must be above 0"),
        ({"train.seq_len": 0}, "train: seq_len=0 must be above 0"),
        ({"train.batch_tokens": 0}, "train: batch_tokens=0 must be above 0"),
        ({"train.batch_tokens": 48}, "train: batch_tokens=48 must be a multiple of seq_len=32"),
        (
            {"train.micro_batch_tokens": 48},
            "train: micro_batch_tokens=48 must be a multiple of seq_len=32",
        ),
        ({"train.max_clock_s": 0.0}, "train: max_clock_s=0.0 must be above 0"),
        ({"train.warmup_steps": -1}, "train: warmup_steps=-1 is below 0"),
        (
            {"train.schedule.basis": "wallclock"},
            "train: schedule.basis=wallclock needs max_clock_s",
        ),
        (
            {"train.schedule.warmdown_iters": 13},
            "train: schedule.warmdown_iters=13 exceeds iterations=12",
        ),
        (
            {"train.schedule.warmdown_iters": -1},
            "train.schedule: warmdown_iters=-1 is below 0",
        ),
        (
            {"train.schedule.min_lr_scale": 1.0},
            "train.schedule: min_lr_scale=1.0 is outside [0, 1)",
        ),
        ({"train.optimizer.matrix.lr": 0.0}, "train.optimizer.matrix: lr=0.0 must be above 0"),
        (
            {"train.optimizer.matrix.ns_steps": 0},
            "train.optimizer.matrix: ns_steps=0 must be above 0",
        ),
        (
            {"train.optimizer.matrix.momentum": 1.0},
            "train.optimizer.matrix: momentum=1.0 is outside [0, 1)",
        ),
        (
            {"train.optimizer.matrix.momentum_start": -0.1},
            "train.optimizer.matrix: momentum_start=-0.1 is outside [0, 1)",
        ),
        (
            {"train.optimizer.matrix.momentum_warmup_steps": -1},
            "train.optimizer.matrix: momentum_warmup_steps is below 0",
        ),
        (
            {"train.optimizer.matrix.weight_decay": -0.1},
            "train.optimizer.matrix: weight_decay=-0.1 is below 0",
        ),
        ({"train.optimizer.embed.lr": 0.0}, "train.optimizer.embed: lr=0.0 must be above 0"),
        ({"train.optimizer.embed.eps": 0.0}, "train.optimizer.embed: eps=0.0 must be above 0"),
        (
            {"train.optimizer.scalar.beta1": 1.0},
            "train.optimizer.scalar: beta1=1.0 is outside [0, 1)",
        ),
        (
            {"train.optimizer.scalar.beta2": -1.0},
            "train.optimizer.scalar: beta2=-1.0 is outside [0, 1)",
        ),
        (
            {"train.optimizer.embed.weight_decay": -1.0},
            "train.optimizer.embed: weight_decay=-1.0 is below 0",
        ),
        ({"train.optimizer.grad_clip": 0.0}, "train.optimizer: grad_clip=0.0 must be above 0"),
        ({"train.averages.swa.every": 0}, "train.averages.swa: every=0 must be above 0"),
        (
            {"train.averages.swa.start": {"lr_scale": 0.0}},
            "train.averages.swa.start: lr_scale=0.0 must be above 0",
        ),
        (
            {"train.averages.swa.start": {"progress": 1.0}},
            "train.averages.swa.start: progress=1.0 is outside [0, 1)",
        ),
        (
            {"train.averages.swa.start": {"progress": 0.5, "lr_scale": 0.5}},
            "train.averages.swa.start: give either lr_scale or progress",
        ),
        (
            {"train.schedule.warmdown_iters": 0},
            "train: averages.swa.start.lr_scale=0.4 is never reached: the schedule has no "
            "warmdown below it",
        ),
        (
            {"train.schedule.min_lr_scale": 0.4},
            "train: averages.swa.start.lr_scale=0.4 is never reached: the schedule has no "
            "warmdown below it",
        ),
        (
            {
                "train.averages.swa": None,
                "train.schedule.warmdown_iters": 0,
                "train.qat": {"mlp_bits": 6, "start": {"lr_scale": 0.15}},
            },
            "train: qat.start.lr_scale=0.15 is never reached: the schedule has no warmdown "
            "below it",
        ),
        (
            {"train.schedule.warmdown_fraction": 0.5},
            "train.schedule: warmdown_iters=4 beside warmdown_fraction=0.5: set one to 0 or null",
        ),
        (
            {"train.schedule": {"warmdown_iters": 0, "warmdown_fraction": 0.0}},
            "train.schedule: warmdown_fraction=0.0 is outside (0, 1]",
        ),
        (
            {"train.optimizer.matrix": {"coefficients": "polar_express", "ns_steps": 6}},
            "train.optimizer.matrix: ns_steps=6: polar_express has coefficients for 5 steps",
        ),
        (
            {"train.optimizer.matrix.ns_dtype": "float16"},
            "train.optimizer.matrix.ns_dtype: got \"float16\"; input should be 'float32' or "
            "'bfloat16'",
        ),
        ({"train.averages.ema_every": 0}, "train.averages: ema_every=0 must be above 0"),
        (
            {"train.qat": {}},
            "train.qat: give bits to one of mlp_bits, attention_bits, other_bits",
        ),
        ({"train.qat": {"mlp_bits": 9}}, "train.qat: mlp_bits=9 is outside 2..8"),
        ({"train.qat": {"other_bits": 1}}, "train.qat: other_bits=1 is outside 2..8"),
        (
            {"train.qat": {"mlp_bits": 6, "scale_floor": 0.0}},
            "train.qat: scale_floor=0.0 must be above 0",
        ),
        (
            {"train.qat": {"mlp_bits": 6, "start": {"progress": 0.0}}},
            "train.qat: start has come at step 0 already: leave it out to act from there",
        ),
        (
            {"train.qat": {"mlp_bits": 6, "start": {"lr_scale": 1.5}}},
            "train.qat: start has come at step 0 already: leave it out to act from there",
        ),
        (
            {"train.averages.ema_decay": 1.0},
            "train.averages: an EMA decay of 1.0 is outside (0, 1)",
        ),
        (
            {"train.averages.ema_bank": [0.5, 0.0]},
            "train.averages: an EMA decay of 0.0 is outside (0, 1)",
        ),
        ({"final.prune.ratio": 1.0}, "final.prune: ratio=1.0 is outside [0, 1)"),
        (
            {"final.quantize.bits.mlp": 9},
            "final.quantize.bits: mlp=9 is neither in 2..8 nor 16",
        ),
        (
            {"final.quantize.bits.embed": 1},
            "final.quantize.bits: embed=1 is neither in 2..8 nor 16",
        ),
        (
            {"final.quantize.int8": {"quantile": 1.5}},
            "final.quantize.int8: quantile=1.5 is outside (0, 1]",
        ),
        ({"final.prune.larger_than": -1}, "final.prune: larger_than=-1 is below 0"),
        (
            {"final.compress": {"long_distance": True, "window_log": 28}},
            "final.compress: window_log=28 is outside 10..27",
        ),
        (
            {"final.compress.window_log": 25},
            "final.compress: window_log=25 needs long_distance: true",
        ),
        (
            {"final.quantize.clip": "p4"},
            "final.quantize: clip='p4' is not one of none, p3, p5, p9, r9 or sd<k>, such as sd12",
        ),
        (
            {"final.quantize.clip": "sd0"},
            "final.quantize: clip='sd0' is not one of none, p3, p5, p9, r9 or sd<k>, such as sd12",
        ),
        (
            {"final.quantize.scale_floor": 0.0},
            "final.quantize: scale_floor=0.0 must be above 0",
        ),
        ({"final.quantize.float_numel": -1}, "final.quantize: float_numel=-1 is below 0"),
        ({"final.compress.level": 23}, "final.compress: level=23 is outside 1..22"),
        ({"evaluate.window": 0}, "evaluate: window=0 must be above 0"),
        ({"evaluate.stride": 0}, "evaluate: stride=0 must be above 0"),
        ({"evaluate.batch_windows": 0}, "evaluate: batch_windows=0 must be above 0"),
        (
            {"evaluate.stride": 33},
            "evaluate: stride=33 exceeds window=32: predictions would be skipped",
        ),
        ({"observe.log_every": 0}, "observe: log_every=0 must be above 0"),
        ({"observe.validate_every": 0}, "observe: validate_every=0 must be above 0"),
        ({"observe.checkpoint_every": 0}, "observe: checkpoint_every=0 must be above 0"),
        (
            {"final.average": "ema", "train.averages": None},
            "train.averages: got null; input should be an object",
        ),
        (
            {"final.average": "ema", "train.averages.ema_decay": None},
            "final.average=ema but the training keeps none; set train.averages.ema_decay",
        ),
        (
            {"final.average": "swa", "train.averages.swa": None},
            "final.average=swa but the training keeps none; add train.averages.swa: {}",
        ),
    ],
)
def test_a_broken_rule_is_one_line_with_the_field_and_its_value(values, line):
    with pytest.raises(UsageError) as caught:
        parse(Recipe, tiny.recipe_data(values), "r")

    assert str(caught.value) == f"r: {line}"


def test_a_spec_is_frozen_and_slotted():
    spec = EvaluateSpec(window=8, stride=4)

    with pytest.raises(FrozenInstanceError):
        spec.window = 9
    assert not hasattr(spec, "__dict__")


def test_a_derived_spec_is_held_to_the_same_rules():
    spec = EvaluateSpec(window=8, stride=4)

    with pytest.raises(ValueError, match="stride=9 exceeds window=8"):
        replace(spec, stride=9)


def test_sd_clip_reads_k_and_leaves_other_clips_alone():
    found = [sd_clip(clip) for clip in ("sd12", "sd12.85", "p5", "none", "sd", "sd1.")]

    assert found == [12.0, 12.85, None, None, None, None]


def test_kept_decays_are_ascending_without_repeats():
    averages = Averages(ema_decay=0.9, ema_bank=(0.99, 0.5, 0.9))

    assert averages.decays() == (0.5, 0.9, 0.99)


def test_the_choice_of_a_final_does_not_change_its_training():
    one = tiny.recipe({"train.averages.ema_decay": 0.9, "train.averages.ema_bank": [0.5]})
    other = tiny.recipe(
        {
            "train.averages.ema_decay": 0.5,
            "train.averages.ema_bank": [0.9],
            "final.average": "ema",
            "final.quantize.clip": "sd12",
            "evaluate.stride": 4,
            "name": "other",
        }
    )

    unseen = [replace(train_task(recipe), observe=Observe()) for recipe in (one, other)]
    assert fingerprint(unseen[0]) == fingerprint(unseen[1])


def test_a_training_is_told_its_parity_window_and_what_to_observe():
    task = train_task(tiny.recipe({"evaluate.window": 16, "observe.log_every": 3}))

    assert (task.parity_window, task.observe.log_every) == (16, 3)


@pytest.mark.parametrize(("average", "entry"), [("raw", "raw"), ("ema", "ema-0.9"), ("swa", "swa")])
def test_a_final_names_the_bank_entry_it_takes(average, entry):
    task = final_task(tiny.recipe({"final.average": average}))

    assert task.entry == entry


def test_entries_of_near_decays_have_different_names():
    assert ema_entry(0.9965) != ema_entry(0.99650001)


def test_absent_parts_are_not_dumped():
    plain = dump(tiny.bare_model())

    assert "unet" not in plain
    assert plain["attention"] == {"num_heads": 2, "num_kv_heads": 1, "rope": {"base": 10_000.0}}
