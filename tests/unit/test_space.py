import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from trainer.codec import parse, read_mapping
from trainer.errors import UsageError
from trainer.specs.recipe import Recipe
from tune_spaces import catalogue
from tune_spaces.axes import Axis
from tune_spaces.space import check_space, grid, num_points, of_phase, phase_of, sample

WARMDOWN, DECAY = "train.schedule.warmdown_iters", "train.averages.ema_decay"
CLIP, STRIDE = "final.quantize.clip", "evaluate.stride"
AXES = {
    WARMDOWN: Axis(values=(2, 4)),
    DECAY: Axis(values=(0.5, 0.9, 0.99)),
    CLIP: Axis(values=("none", "p5")),
}


def check(axes, values=None):
    check_space(axes, tiny.recipe_data(values), "sweep.yaml", "micro.yaml")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({}, "give either values: [...] or both min and max"),
        ({"values": [1], "min": 0.0}, "give either values: [...] or both min and max"),
        ({"values": []}, "values is empty"),
        ({"values": [1, 2, 1]}, "values has a repeat"),
        ({"values": [1, 1.0]}, "values has a repeat"),
        ({"values": [1], "num": 2}, "num goes with min and max"),
        ({"min": 1.0}, "a range needs both min and max"),
        ({"min": 2.0, "max": 1.0}, "min=2.0 is not below max=1.0"),
        ({"min": 0.0, "max": 1.0, "scale": "log"}, "a log scale needs min=0.0 above 0"),
        ({"min": 0.0, "max": 1.0, "num": 1}, "num=1 must be at least 2"),
    ],
)
def test_an_axis_that_makes_no_sense_is_refused(data, reason):
    with pytest.raises(UsageError) as caught:
        parse(Axis, data, "axis")

    assert str(caught.value) == f"axis: {reason}"


@pytest.mark.parametrize(
    ("axis", "points"),
    [
        (Axis(values=("none", "p5")), ("none", "p5")),
        (Axis(min=0.0, max=1.0, num=3), (0.0, 0.5, 1.0)),
        (Axis(min=1e-4, max=1e-2, num=3, scale="log"), (1e-4, 1e-3, 1e-2)),
        (Axis(min=1.0, max=2.0, num=4), (1.0, 1.33333, 1.66667, 2.0)),
    ],
)
def test_a_grid_holds_the_values_or_evenly_spaced_points(axis, points):
    assert axis.grid() == points


@given(st.floats(1e-6, 1e3), st.floats(1.001, 100.0), st.sampled_from(["linear", "log"]))
def test_a_draw_stays_in_its_range(low, factor, scale):
    axis = Axis(min=low, max=low * factor, scale=scale)

    drawn = axis.draw(np.random.default_rng(0))

    assert axis.min <= drawn <= axis.max


def test_a_log_range_draws_each_decade_alike():
    generator = np.random.default_rng(0)
    axis = Axis(min=1e-4, max=1.0, scale="log")

    low = sum(axis.draw(generator) < 1e-2 for _ in range(2000))

    assert 900 < low < 1100


def test_a_whole_range_draws_its_ends_as_often_as_the_rest():
    generator = np.random.default_rng(0)
    axis = Axis(min=1, max=4)

    drawn = [axis.draw(generator, is_integer=True) for _ in range(4000)]

    assert all(900 < drawn.count(value) < 1100 for value in (1, 2, 3, 4))
    assert {type(value) for value in drawn} == {int}


@pytest.mark.parametrize(
    ("path", "phase"),
    [
        ("model.mlp.mult", "train"),
        ("train.optimizer.matrix.lr", "train"),
        (DECAY, "bank"),
        ("final.average", "bank"),
        (CLIP, "final"),
        (STRIDE, "eval"),
        ("observe.log_every", None),
        ("data.name", None),
    ],
)
def test_a_knob_acts_in_the_phase_of_its_path(path, phase):
    assert phase_of(path) == phase


def test_axes_of_a_phase_keep_their_order():
    assert list(of_phase(AXES, "final", "bank")) == [DECAY, CLIP]


def test_a_grid_is_every_combination_with_the_last_axis_fastest():
    points = grid(AXES, {}, "s")

    assert len(points) == num_points(AXES) == 12
    assert points[0] == {WARMDOWN: 2, DECAY: 0.5, CLIP: "none"}
    assert points[1] == {WARMDOWN: 2, DECAY: 0.5, CLIP: "p5"}
    assert points[-1] == {WARMDOWN: 4, DECAY: 0.99, CLIP: "p5"}
    assert len({tuple(point.values()) for point in points}) == 12


def test_a_space_without_axes_has_one_point():
    assert grid({}, {}, "s") == [{}]
    assert num_points({}) == 1


def test_a_range_has_no_number_of_points_and_no_grid_without_num():
    axes = AXES | {"final.prune.ratio": Axis(min=0.0, max=0.1)}

    assert num_points(axes) is None
    with pytest.raises(UsageError, match=r"^s: space\.final\.prune\.ratio: a grid over a range"):
        grid(axes, {}, "s")


def test_a_sample_is_repeated_by_its_seed_and_has_no_repeats():
    first, again, other = (sample(AXES, {}, 9, seed, "s") for seed in (1, 1, 2))

    assert first == again != other
    assert len({tuple(point.values()) for point in first}) == 9


def test_all_points_of_a_space_can_be_sampled():
    points = sample(AXES, {}, 12, 0, "s")

    assert sorted(map(str, points)) == sorted(map(str, grid(AXES, {}, "s")))


def test_more_points_than_exist_are_refused():
    with pytest.raises(UsageError, match=r"^s: 13 points are asked for, but the space has 12"):
        sample(AXES, {}, 13, 0, "s")


def test_more_points_than_a_narrow_range_tells_apart_are_refused():
    narrow = {"final.prune.ratio": Axis(min=0.5, max=0.5000001)}

    with pytest.raises(UsageError, match=r"^s: 5 points .* gave only 1 different ones"):
        sample(narrow, {}, 5, 0, "s")


def test_a_space_that_fits_its_recipe_is_accepted():
    check(AXES | {STRIDE: Axis(values=(8, 16)), "final.prune.ratio": Axis(min=0.0, max=0.1)})


@pytest.mark.parametrize(
    ("path", "axis", "fault"),
    [
        ("train.lr", Axis(values=(1,)), "no knob 'train.lr'; known here: "),
        ("train.itera", Axis(values=(1,)), "no knob 'train.itera'; did you mean iterations?"),
        ("model.unet", Axis(values=(1,)), "'model.unet' is a part, not a value"),
        ("train.seed", Axis(values=(1,)), "not an axis; list seeds under seeds.search"),
        ("data.name", Axis(values=("x",)), "not a knob of a search; set it under overrides"),
        (
            CLIP,
            Axis(values=("p5",), phase="train"),
            "phase train is wrong; this knob acts in phase final",
        ),
    ],
)
def test_an_axis_without_a_knob_is_refused_by_its_path(path, axis, fault):
    with pytest.raises(UsageError) as caught:
        check({path: axis})

    assert str(caught.value).startswith(f"sweep.yaml: space.{path}: {fault}")


def test_every_value_is_held_to_the_fields_own_rules():
    axes = {CLIP: Axis(values=("none", "p4", "p6")), STRIDE: Axis(values=(8, 64))}

    with pytest.raises(UsageError) as caught:
        check(axes)

    faults = str(caught.value).splitlines()
    assert len(faults) == 3
    assert faults[0].startswith(f"sweep.yaml: space.{CLIP}=p4: final.quantize: clip='p4'")
    assert faults[2].startswith(f"sweep.yaml: space.{STRIDE}=64: evaluate: stride=64 exceeds")


def test_both_ends_of_a_range_must_be_allowed():
    with pytest.raises(UsageError, match=r"space\.final\.prune\.ratio=1\.0: final\.prune: ratio"):
        check({"final.prune.ratio": Axis(min=0.0, max=1.0)})


def test_a_recipe_that_only_the_space_completes_is_accepted():
    lacking = {"train.averages.ema_decay": None, "final.average": "ema"}

    check({DECAY: Axis(values=(0.9, 0.99))}, lacking)

    with pytest.raises(UsageError, match=r"^micro\.yaml: final\.average=ema"):
        check({CLIP: Axis(values=("none",))}, lacking)


@pytest.mark.parametrize("name", catalogue.names("recipes"))
def test_a_shipped_recipe_parses_and_has_a_card(name):
    recipe = parse(Recipe, catalogue.load_recipe(name, "test"), name)

    assert recipe.name == name
    assert len(catalogue.describe(name)) > 20


@pytest.mark.parametrize("name", catalogue.names("sweeps"))
def test_a_shipped_sweeps_space_fits_its_recipe(name):
    sweep = read_mapping(catalogue.find("sweeps", name, "test"))
    axes = {path: parse(Axis, axis, path) for path, axis in sweep["space"].items()}

    check_space(axes, catalogue.load_recipe(sweep["recipe"], "test"), name, sweep["recipe"])


def test_a_recipe_is_found_by_name_or_path(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("name: own\n", encoding="utf-8")

    assert catalogue.find("recipes", "tiny", "s").name == "tiny.yaml"
    assert catalogue.load_recipe(str(own), "s") == {"name": "own"}


def test_an_unknown_recipe_suggests_a_shipped_one():
    with pytest.raises(UsageError, match=r"^s: no recipe 'tinny'; did you mean tiny\?"):
        catalogue.find("recipes", "tinny", "s")
