"""The shipped recipes: the published sizes, their cards, and scale-downs that leave nothing out."""

import re
from functools import cache
from typing import Any

import pytest

from trainer.codec import dump, flatten, parse
from trainer.protocol import ARTIFACT_BYTES_CAP
from trainer.sizes import forecast_weights_bytes, num_params
from trainer.specs.recipe import Recipe
from tune_spaces import catalogue

SYSTEMS = ("baseline", "pr348", "pr361", "pr414", "pr610", "pr951")
VARIANTS = tuple(f"{name}-as-described" for name in SYSTEMS if name != "baseline")
SCALE_DOWNS = tuple(f"{name}-tiny" for name in SYSTEMS)
ONE_H200 = ("pr414-one-h200", "pr610-one-h200")
# What a scale-down takes away: a clock, and what is looked at on the way.
NOT_IN_A_SCALE_DOWN = {
    "train.max_clock_s",
    "train.micro_batch_tokens",
    "observe.validate_every",
    "observe.checkpoint_every",
}
# Values, and not sizes: a scale-down has its parent's.
SAME_AT_EVERY_SCALE = re.compile(
    r".*\.kind|model\.vocab_size|model\.mlp\..*|model\..*init.*|model\.softcap\..*"
    r"|train\.qat\..*|train\.seed|train\.averages\.swa\.start\..*|train\.optimizer\..*\.lr"
    r"|train\.optimizer\..*\.weight_decay|train\.optimizer\.grad_clip"
    r"|final\.average|final\.prune\.(ratio|tables)"
    r"|final\.quantize\.(bits\..*|clip|clip_scope|scale_floor|symmetric|int8\..*)"
)


@cache
def recipe(name: str) -> Recipe:
    return parse(Recipe, catalogue.load_recipe(name, "test"), name)


def flat(name: str) -> dict[str, Any]:
    return flatten(recipe(name))


def changed(name: str, other: str) -> dict[str, Any]:
    """What another recipe has in place of this one's values; None for what it lacks."""
    old, new = flat(name), flat(other)
    paths = sorted(set(old) | set(new))
    return {path: new.get(path) for path in paths if old.get(path) != new.get(path)}


def test_every_system_its_variant_and_its_scale_down_are_shipped() -> None:
    assert catalogue.names("recipes") == sorted(
        [*SYSTEMS, *VARIANTS, *SCALE_DOWNS, *ONE_H200, "tiny"]
    )


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("baseline", 17_059_912),
        ("pr414", 26_993_756),
        ("pr610", 26_993_756),
        ("pr348", 25_779_281),
        ("pr361", 24_730_705),
        ("pr951", 41_947_778),
    ],
)
def test_a_system_has_the_number_of_parameters_that_was_published(name: str, published: int):
    assert num_params(recipe(name).model) == published


def test_pr414_without_its_value_embedding_is_the_record_before_it() -> None:
    data = catalogue.load_recipe("pr414", "test")
    data["model"]["value_embedding"] = None

    assert num_params(parse(Recipe, data, "pr414").model) == 26_829_913


@pytest.mark.parametrize("name", catalogue.names("recipes"))
def test_a_recipe_survives_being_written_out_in_full(name: str) -> None:
    assert parse(Recipe, dump(recipe(name)), name) == recipe(name)


@pytest.mark.parametrize("name", catalogue.names("recipes"))
def test_a_recipe_opens_with_a_line_that_says_what_it_is(name: str) -> None:
    assert 20 < len(catalogue.describe(name)) < 80


@pytest.mark.parametrize("name", catalogue.names("recipes"))
def test_every_recipe_has_a_complete_card(name: str) -> None:
    assert set(catalogue.card(name)) == set(catalogue.CARD_BULLETS)


def test_every_card_is_of_a_shipped_recipe() -> None:
    assert sorted(catalogue.cards()) == catalogue.names("recipes")


@pytest.mark.parametrize("name", [*SYSTEMS, *VARIANTS, *ONE_H200])
def test_the_card_has_the_parameters_and_the_forecast_of_the_recipe(name: str) -> None:
    card, full = catalogue.card(name), recipe(name)

    assert card["parameters"] == f"{num_params(full.model):,}"
    stated = re.match(r"(\d+\.\d\d) MB", card["forecast"])
    assert stated is not None
    assert float(stated[1]) == pytest.approx(
        forecast_weights_bytes(full.model, full.final) / 1e6, abs=0.01
    )


def test_the_systems_that_were_never_run_are_over_the_cap_by_forecast_and_by_card() -> None:
    over = {
        name
        for name in (*SYSTEMS, *VARIANTS)
        if catalogue.card(name)["legal"].startswith("over the cap.")
    }

    assert over == {"pr361", "pr361-as-described", "pr951", "pr951-as-described"}
    for name in over:
        full = recipe(name)
        assert forecast_weights_bytes(full.model, full.final) > ARTIFACT_BYTES_CAP


@pytest.mark.parametrize("name", ["pr361", "pr951", "pr610"])
def test_a_card_says_that_test_time_training_is_not_scored(name: str) -> None:
    for card in (catalogue.card(name), catalogue.card(f"{name}-as-described")):
        assert "without test-time training" in card["legal"]


@pytest.mark.parametrize(
    ("name", "differs"),
    [
        (
            "pr361",
            {
                "train.averages.swa.start.lr_scale": None,
                "train.averages.swa.start.progress": 0.5,
                "train.qat.scale": "row",
                "train.qat.scale_floor": 1e-12,
            },
        ),
        (
            "pr414",
            {
                "model.ortho_init.scaled_outputs": True,
                "train.averages.swa.start.lr_scale": 0.2,
                "train.averages.swa.every": 50,
                "train.qat.mlp_bits": 6,
                "train.qat.attention_bits": 6,
                "train.qat.other_bits": 6,
                "train.qat.scale": "row",
                "train.qat.scale_floor": 1 / 31,
                "train.qat.start.lr_scale": 0.15,
                "final.quantize.clip_scope": "row",
            },
        ),
        ("pr951", {"evaluate.stride": 32}),
        ("pr348", {"train.averages.swa.every": 25}),
        (
            "pr610",
            {
                "model.ln_scale.learned": True,
                "train.qat.mlp_bits": 6,
                "train.qat.attention_bits": 6,
                "train.qat.other_bits": 6,
                "train.qat.scale": "row",
                "train.qat.scale_floor": 1 / 31,
                "train.qat.start.lr_scale": 0.15,
                "final.quantize.clip_scope": "row",
            },
        ),
    ],
)
def test_a_variant_changes_what_the_text_describes_and_nothing_else(
    name: str, differs: dict[str, Any]
) -> None:
    variant = f"{name}-as-described"

    assert changed(name, variant) == differs | {"name": variant}


def test_pr610_is_pr414_with_three_things_changed() -> None:
    differs = set(changed("pr414", "pr610")) - {"name"}

    assert {path.rpartition(".")[0] for path in differs} == {
        "model.mlp.activation",
        "train",
        "final.compress",
    }


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_scale_down_has_every_part_of_its_recipe(name: str) -> None:
    full, small = flat(name), flat(f"{name}-tiny")

    assert set(full) - NOT_IN_A_SCALE_DOWN == set(small) - {"train.micro_batch_tokens"}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_scale_down_changes_sizes_and_nothing_else(name: str) -> None:
    fixed = [path for path in changed(name, f"{name}-tiny") if SAME_AT_EVERY_SCALE.fullmatch(path)]

    assert fixed == []


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_scale_down_is_below_a_megabyte_and_still_stores_integers(name: str) -> None:
    small = recipe(f"{name}-tiny")

    floats = small.final.quantize.float_numel

    assert forecast_weights_bytes(small.model, small.final) < 1_000_000
    assert floats < small.model.dim * small.model.dim // 2  # a key projection is integers, too


@pytest.mark.parametrize("name", ["pr361", "pr951", "pr348"])
def test_a_scale_down_of_a_pruned_recipe_prunes(name: str) -> None:
    small = recipe(f"{name}-tiny")

    assert small.final.prune is not None
    assert small.final.prune.larger_than < small.model.dim * small.model.dim // 2


@pytest.mark.parametrize("name", ONE_H200)
def test_a_recipe_for_one_h200_trains_and_scores_the_same_model(name: str) -> None:
    differs = changed(name.removesuffix("-one-h200"), name)

    fits = {"final"} if name == "pr610-one-h200" else set()
    parts = {path.partition(".")[0] for path in differs}
    assert parts == {"name", "train", "evaluate", "observe"} | fits
    kept = re.compile(r"train\..*(seed|\.lr|decay|clip|seq_len)|final\..*(bits|clip|average)")
    assert not [path for path in differs if kept.match(path)]
    assert differs.keys() & {"evaluate.window", "evaluate.stride"} == set()


@pytest.mark.parametrize("name", ONE_H200)
def test_a_recipe_for_one_h200_takes_every_fast_path_for_ten_minutes(name: str) -> None:
    full = recipe(name)

    assert full.train.max_clock_s == 600.0
    assert full.train.compile
    assert full.train.fused
    assert full.evaluate.compile
    assert full.evaluate.fused
    for kernel in (full.train.attention, full.evaluate.attention):
        assert kernel is not None
        assert (kernel.name, kernel.substitute) == ("flash_attn_4", "cudnn")
    assert forecast_weights_bytes(full.model, full.final) < ARTIFACT_BYTES_CAP


def test_the_two_recipes_for_one_h200_are_trained_apart_as_the_published_ones() -> None:
    apart, published = changed(*ONE_H200), changed("pr414", "pr610")

    trained = [
        {path for path in paths if path.startswith(("model.", "train."))}
        for paths in (apart, published)
    ]
    assert trained[0] == trained[1] - {"train.max_clock_s"} != set()
