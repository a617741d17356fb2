"""What a recipe decides of a condition, and what it must not be taken to decide."""

import ast

import pytest

from service.singlefile.cut import Cut
from service.singlefile.evaluate import Evaluator
from service.singlefile.program import parse_module
from service.singlefile.world import World
from tests import tiny
from trainer.specs.task import final_task, train_task

HEAD = """\
from dataclasses import replace
from trainer.evaluate.journal import Journal
from trainer.evaluate.tape import Tape
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.final import Compress, RangeCoder, Zstd
from trainer.specs.model import ModelSpec, SmearV1, SmearV2
from trainer.specs.train import TrainSpec

def f({parameters}):
    {body}
    return {result}
"""
SPECS = "model: ModelSpec, train: TrainSpec, evaluate: EvaluateSpec, compress: Compress"


@pytest.fixture(scope="module")
def world() -> World:
    """What is known once a plain recipe's file is cut."""
    recipe = tiny.recipe()
    return Cut(train_task(recipe), final_task(recipe), world_size=1).world


@pytest.fixture
def truth(world: World):
    def of(result: str, body: str = "pass", parameters: str = SPECS) -> set[bool]:
        source = HEAD.format(parameters=parameters, body=body, result=result)
        module = parse_module("trainer.made_up", source)
        function = module.definitions["f"].node
        assert isinstance(function, ast.FunctionDef)
        returned = function.body[-1]
        assert isinstance(returned, ast.Return)
        assert returned.value is not None
        return set(Evaluator(world, module, function).truth(returned.value))

    return of


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("model.bigram is None", True),
        ("model.unet is not None and model.unet.gate is None", True),
        ("isinstance(model.smear, SmearV1 | SmearV2)", False),
        ("isinstance(compress, Zstd)", True),
        ("isinstance(compress, RangeCoder)", False),
        ("compress.level == 3", True),
        ("train.qat and train.qat.start", False),
    ],
)
def test_a_recipe_decides_a_condition_on_its_parts(truth, condition: str, holds: bool) -> None:
    assert truth(condition) == {holds}


def test_what_the_command_line_sets_is_not_decided(truth) -> None:
    assert truth("train.seed == 1337") == {True, False}


def test_a_value_that_some_object_has_and_another_has_not_is_not_decided(truth) -> None:
    # The validator's windows do not overlap, the evaluation's do.
    assert truth("evaluate.stride == 8") == {True, False}


def test_an_object_of_a_class_that_nobody_makes_can_only_be_none(truth) -> None:
    assert truth("x is None", parameters="x: Journal | None") == {True}
    assert truth("x is None", parameters="x: Tape | None") == {True, False}


@pytest.mark.parametrize("made", ["[]", "[None]", "list(model.attention.rope)", "{'a': None}"])
def test_what_a_list_or_mapping_holds_is_not_decided(truth, made: str) -> None:
    for part in ("any(held)", "held[0] is None", "len(held) == 0"):
        assert truth(part, body=f"held = {made}") == {True, False}


@pytest.mark.parametrize(
    "body",
    [
        "x = None\n    x = g()",
        "x = 1\n    x += 1",
        "for x in g(): pass",
        "with g() as x: pass",
        "x, y = g()",
    ],
)
def test_a_name_that_is_bound_to_something_unknown_is_not_decided(truth, body: str) -> None:
    assert truth("x is None", body=body) == {True, False}


def test_a_spec_is_not_held_to_equal_another(truth) -> None:
    assert truth("train == replace(train, seed=1)") == {True, False}
