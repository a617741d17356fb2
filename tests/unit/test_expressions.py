"""The expressions of a sweep file: what they can say, and what they refuse to do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from trainer.errors import UsageError
from tune_spaces.expressions import parse_expression

AT = "sweep.yaml: where[0]"
RECIPE = tiny.recipe_data({"evaluate.ttt.kind": "sgd", "final.quantize.clip": "none"})


def value(text, recipe=RECIPE):
    return parse_expression(text, AT).value(recipe)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("train.iterations", 12),
        ("train.iterations * 2 + 1", 25),
        ("-train.iterations // 5", -3),
        ("train.iterations / 8", 1.5),
        ("train.iterations % 5", 2),
        ("2 ** 10", 1024),
        ("round(train.iterations * 0.3)", 4),
        ("round(train.iterations / 7, 2)", 1.71),
        ("round(1234, -2)", 1200),
        ("min(train.iterations, 5, 7)", 5),
        ("max(abs(-3), int(2.9))", 3),
        ("train.schedule.min_lr_scale", 0.0),  # a default that the file does not write
        ("train.order", "shuffled"),
        ("evaluate.ttt", "sgd"),  # a part is its kind
        ("final.prune", None),
        ("final.prune.ratio", None),  # of a part that is absent
        ("train.iterations > 3", True),
        ("1 < train.iterations <= 12", True),
        ("train.iterations == 12.0", True),
        ("train.order == 'shuffled'", True),
        ("train.order != 'shuffled'", False),
        ("evaluate.ttt is sgd", True),
        ("evaluate.ttt is not sgd", False),
        ("evaluate.ttt in [lora, oracle]", False),
        ("train.order not in [sequential]", True),
        ("final.prune is none", True),
        ("final.quantize.clip is none", True),  # here the word of a choice
        ("model.mlp.activation is relu2", True),  # the default's kind
        ("train.compile is false", True),
        ("train.iterations in [-1, 12]", True),
        ("train.compile or train.iterations > 3 and not train.compile", True),
        ("true and none is none", True),
    ],
)
def test_an_expression_reads_the_recipe(text, result):
    assert value(text) == result


def test_a_kind_that_a_point_chooses_brings_its_own_defaults():
    lora = tiny.recipe_data({"evaluate.ttt.kind": "lora"})

    assert value("evaluate.ttt.rank", lora) == 96
    assert value("evaluate.ttt.rank") is None  # sgd has none


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not an expression"),
        ("1 +", "not an expression"),
        ("1; 2", "not an expression"),
        ("x = 1", "not an expression"),
        ("train.iteration", "did you mean iterations?"),
        ("sgd", "or write 'sgd' for a word"),
        ("train.seed > 1", "train.seed is listed under seeds"),
        ("__import__('os').system('true')", "is not allowed"),
        ("open('file')", "is not allowed"),
        ("train.__class__", "no knob"),
        ("train.iterations.__class__", "no knob"),
        ("(1).__class__", "is not a path"),
        ("[x for x in [1]]", "is not allowed"),
        ("(lambda: 1)()", "is not allowed"),
        ("f'{1}'", "is not allowed"),
        ("max(*[1, 2])", "is not allowed"),
        ("max(1, key=abs)", "is not allowed"),
        ("train['iterations']", "is not allowed"),
        ("1 if true else 2", "is not allowed"),
        ("1j", "is not allowed"),
        ("b'a'", "is not allowed"),
        ("train.iterations & 1", "is not allowed"),
        ("evaluate.ttt is train.order", "is not a word or a number"),
        ("evaluate.ttt is [sgd]", "write `is WORD`"),
        ("train.order in sequential", "write `is WORD`"),
        ("1e999", "too large"),
        ("99999999999999999999", "too large"),
        ("'\\x41'", "without backslashes"),
        ("1 +\n1", "in one line"),
        ("1" + " + 1" * 80, "longer than 300 characters"),
        ("(" * 250 + "1" + ")" * 250, "longer than 300 characters"),
        ("(" * 140 + "1", "not an expression"),
        ("-" * 299 + "1", "more than 250 parts"),
    ],
)
def test_what_is_no_expression_is_refused_in_one_line_with_file_and_field(text, reason):
    with pytest.raises(UsageError) as caught:
        parse_expression(text, AT)

    message = str(caught.value)
    assert message.startswith(f"{AT}: ")
    assert reason in message
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("9 ** 9 ** 9", "a power is too large"),
        ("2 ** 64 * 1", "a number is too large"),
        ("9223372036854775807 + 9", "a number is too large"),
        ("10.0 ** 64", "a number is too large"),
        ("(0 - 2) ** 0.5", "a root of a number below 0"),
        ("1 / 0", "division by zero"),
        ("1 % 0", "modulo"),
        ("'a' * 100", "'a' is not a number"),
        ("train.order + 1", "'shuffled' is not a number"),
        ("train.compile + 1", "False is not a number"),
        ("final.prune.ratio > 0.1", "None is not a number"),
        ("evaluate.ttt > 1", "'sgd' is not a number"),
        ("1 and true", "1 is neither true nor false"),
        ("not train.order", "'shuffled' is neither true nor false"),
        ("int('5')", "'5' is not a number"),
        ("max()", "at least 1 argument"),
        ("round(123456789, -30000000)", "round takes at most 20 digits"),
        ("round(train.iterations, 2 ** 40)", "round takes at most 20 digits"),
        ("round(9223372036854775807, -19)", "a number is too large"),
    ],
)
def test_what_cannot_be_worked_out_is_told_in_one_line(text, reason):
    with pytest.raises(UsageError) as caught:
        value(text)

    assert str(caught.value).startswith(f"{AT}: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_condition_is_true_or_false_and_nothing_else():
    assert parse_expression("train.iterations > 3", AT).holds(RECIPE)
    with pytest.raises(UsageError, match="is 12, neither true nor false"):
        parse_expression("train.iterations", AT).holds(RECIPE)


@given(st.text(max_size=60) | st.from_regex(r"[a-z0-9.()+*/<>=' \-\[\]]{0,40}", fullmatch=True))
def test_any_text_is_an_expression_or_a_usage_error(text):
    told = AT
    try:
        value(text)
    except UsageError as error:
        told = str(error)

    assert told.startswith(AT)
