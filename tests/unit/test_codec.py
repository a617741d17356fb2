import hashlib
import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.strategies import recipes
from trainer import codec
from trainer.errors import UsageError
from trainer.specs.model import ModelSpec, UNetSkips
from trainer.specs.recipe import Recipe

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


def refusal(data: Any, cls: type = Recipe) -> list[str]:
    with pytest.raises(UsageError) as caught:
        codec.parse(cls, data, "r.yaml")
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("3E4", 3e4),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("0x1F", 31),
        ("0o17", 15),
        ("017", 17),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2026-04-01", "2026-04-01"),
        ("~", None),
        ("", None),
        ("true", True),
        ("'1'", "1"),
    ],
)
def test_scalars_follow_the_core_schema(text: str, value: Any) -> None:
    read = codec.read_yaml(f"a: {text}", "r.yaml")["a"]

    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: key 'a' is given twice"),
        ("a: {b: 1, b: 2}", "line 1: key 'b' is given twice"),
        ("a: &x 1\nb: *x", "line 2: aliases are not accepted"),
        ("a: !!float abc", "line 1: tags are not accepted"),
        ("a: !!python/object:os.system {}", "line 1: tags are not accepted"),
        ("[" * 40 + "]" * 40, "line 1: nested deeper than 32 levels"),
        ("? [a]\n: 1", "line 1: keys must be plain words"),
        ("a: " + "9" * 5000, "line 1: the number is too long"),
        ("a: [1", "line 1: "),
        ("a: \x00", "not YAML: "),
        ("a: \udc80", "not YAML: "),
        ("a: '" + "x" * codec.MAX_YAML_BYTES + "'", f"larger than {codec.MAX_YAML_BYTES} bytes"),
    ],
)
def test_yaml_that_could_mislead_is_refused_with_its_line(text: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        codec.read_yaml(text, "r.yaml")

    message = str(caught.value)
    assert message.startswith(f"r.yaml: {reason}")
    assert "\n" not in message


@given(st.text(st.sampled_from("a1-:.,?!&*#|>'\"{}[]%@` \n\t\\x0eE+~<="), max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(UsageError):
        codec.read_yaml(text, "r.yaml")


@given(st.dictionaries(NAMES, PLAIN, max_size=4))
def test_written_yaml_reads_back_the_same(data: dict[str, Any]) -> None:
    present = codec.dump(data)

    assert codec.read_yaml(codec.to_yaml(data), "r.yaml") == present


@settings(max_examples=40)
@given(recipes())
def test_a_recipe_survives_dump_and_parse(recipe: Recipe) -> None:
    assert codec.parse(Recipe, codec.dump(recipe), "r.yaml") == recipe


@settings(max_examples=40)
@given(recipes())
def test_a_recipe_survives_its_yaml_file(recipe: Recipe) -> None:
    data = codec.read_yaml(codec.to_yaml(recipe), "r.yaml")

    assert codec.parse(Recipe, data, "r.yaml") == recipe


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"train.iteratons": 5},
            "r.yaml: train.iteratons: unknown key; did you mean iterations?",
        ),
        ({"modl": {}}, "r.yaml: modl: unknown key; did you mean model?"),
        (
            {"evaluate.zzz": 1},
            "r.yaml: evaluate.zzz: unknown key; known here: window, stride, variant, "
            "batch_windows, attention, compile, fused, documents, ttt",
        ),
        (
            {"train.iterations": "many"},
            'r.yaml: train.iterations: got "many"; input should be a valid integer',
        ),
        (
            {"train.iterations": 1.5},
            "r.yaml: train.iterations: got 1.5; input should be a valid integer",
        ),
        (
            {"train.compile": 1},
            "r.yaml: train.compile: got 1; input should be a valid boolean",
        ),
        (
            {"train.averages.ema_bank": [0.5, "x"]},
            'r.yaml: train.averages.ema_bank[1]: got "x"; input should be a valid number',
        ),
        (
            {"train.max_clock_s": math.inf},
            "r.yaml: train.max_clock_s: got Infinity; input should be a finite number",
        ),
        (
            {"model.mlp.activation": {"kind": "leaky_relu2", "slop": 0.1}},
            "r.yaml: model.mlp.activation.slop: unknown key; did you mean slope?",
        ),
        (
            {"model.attention.num_kv_heads": 3},
            "r.yaml: model.attention: num_kv_heads=3 must divide num_heads=2",
        ),
    ],
)
def test_a_fault_is_one_line_with_path_value_and_hint(values: dict[str, Any], line: str) -> None:
    assert refusal(tiny.recipe_data(values)) == [line]


def test_a_missing_part_is_named() -> None:
    data = tiny.recipe_data()
    del data["model"]["vocab_size"], data["evaluate"]

    assert refusal(data) == ["r.yaml: model.vocab_size: missing", "r.yaml: evaluate: missing"]


def test_what_is_no_mapping_is_refused_without_a_path() -> None:
    assert refusal([1]) == ["r.yaml: got [1]; input should be an object"]


def test_a_long_value_is_cut_in_the_message() -> None:
    (line,) = refusal(tiny.recipe_data({"train.iterations": "x" * 1000}))

    assert len(line) < 200
    assert line.endswith("xxx...; input should be a valid integer")


def test_an_unknown_kind_says_which_exist() -> None:
    lines = refusal(tiny.recipe_data({"model.mlp.activation.kind": "gelu"}))

    assert any("model.mlp.activation.kind" in line and "leaky_relu2" in line for line in lines)


@given(st.sampled_from(sorted(codec.flatten(tiny.recipe()))), PLAIN)
def test_any_value_of_any_knob_is_accepted_or_refused(path: str, value: Any) -> None:
    data = tiny.recipe_data({path: value})

    with suppress(UsageError):
        codec.parse(Recipe, data, "r.yaml")


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_a_recipe_is_laid_over_the_one_it_extends(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "a: 1\nb: {c: 2, d: 3}")
    write(tmp_path, "middle.yaml", "extends: base\nb: {d: 4}")
    top = write(tmp_path, "top.yaml", "extends: middle.yaml\ne: 5\na: null")

    assert codec.read_recipe(top) == {"a": None, "b": {"c": 2, "d": 4}, "e": 5}


def test_a_recipe_is_laid_over_several_the_later_over_the_earlier(tmp_path: Path) -> None:
    (tmp_path / "scales").mkdir()
    write(tmp_path, "root.yaml", "a: 1\nb: {c: 1, d: 1}")
    write(tmp_path, "base.yaml", "extends: root\nb: {e: 1}")
    write(tmp_path / "scales", "small.yaml", "a: null\nb: {c: 2, d: 2}")
    top = write(tmp_path, "top.yaml", "extends: [base, scales/small]\nb: {d: 3}")

    assert codec.read_recipe(top) == {"a": None, "b": {"c": 2, "d": 3, "e": 1}}


def test_two_parents_may_share_a_recipe(tmp_path: Path) -> None:
    write(tmp_path, "root.yaml", "a: 1")
    write(tmp_path, "left.yaml", "extends: root\nb: 2")
    write(tmp_path, "right.yaml", "extends: root\nc: 3")
    top = write(tmp_path, "top.yaml", "extends: [left, right]")

    assert codec.read_recipe(top) == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("extends: other", "does not exist"),
        ("extends: self", "extends itself through self.yaml"),
        ("extends: [1]", "extends must name a recipe in the same folder"),
        ("extends: {a: b}", "extends must name a recipe in the same folder"),
        ("extends: []", "extends must name a recipe in the same folder"),
        ("extends: [self.yaml, other]", "extends 'other', but"),
        ("extends: scales/../self", "extends itself through self.yaml"),
        ("- 1", "expected `key: value` lines at the top level"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_named(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "scales").mkdir()
    path = write(tmp_path, "self.yaml", text)

    with pytest.raises(UsageError) as caught:
        codec.read_recipe(path)

    assert str(caught.value).startswith(f"{path}: ")
    assert reason in str(caught.value)


def test_a_recipe_file_that_is_missing_or_not_text_is_named(tmp_path: Path) -> None:
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"a: \xff")

    with pytest.raises(UsageError, match=r"b\.yaml: not UTF-8 text \(byte 3\)"):
        codec.read_mapping(binary)
    with pytest.raises(UsageError, match=r"none\.yaml: No such file"):
        codec.read_mapping(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("base", "top", "merged"),
    [
        ({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}}, {"a": {"x": 1, "y": 3}}),
        ({"a": {"x": 1}}, {"a": None}, {"a": None}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"k": {"kind": "p", "x": 1}}, {"k": {"x": 2}}, {"k": {"kind": "p", "x": 2}}),
        ({"k": {"kind": "p", "x": 1}}, {"k": {"kind": "q"}}, {"k": {"kind": "q"}}),
        ({"k": {"x": 1}}, {"k": {"kind": "q"}}, {"k": {"x": 1, "kind": "q"}}),
    ],
)
def test_merge_mixes_mappings_but_never_kinds(base: Any, top: Any, merged: Any) -> None:
    assert codec.merge(base, top) == merged


@pytest.mark.parametrize("kind_first", [True, False])
def test_a_kind_is_chosen_before_what_is_set_inside_it(kind_first: bool) -> None:
    values = [("k.kind", "q"), ("k.slope", 0.3)]

    data = codec.with_values({"k": {"kind": "p"}}, values if kind_first else values[::-1])

    assert data == {"k": {"kind": "q", "slope": 0.3}}


def test_values_make_the_parts_on_their_way() -> None:
    data = {"train": {"iterations": 5}}

    changed = codec.with_values(data, [("train.averages.swa.every", 7), ("train.iterations", 6)])

    assert changed == {"train": {"iterations": 6, "averages": {"swa": {"every": 7}}}}
    assert data == {"train": {"iterations": 5}}


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("a.b=1e-3", ("a.b", 1e-3)),
        ("a={x: no}", ("a", {"x": "no"})),
        ("a=b=c", ("a", "b=c")),
        ("a=", ("a", None)),
    ],
)
def test_an_assignment_reads_its_value_as_yaml(text: str, pair: tuple[str, Any]) -> None:
    assert codec.parse_assignment(text) == pair


@pytest.mark.parametrize("text", ["a.b", "=1", "a=[1"])
def test_an_assignment_without_path_or_value_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^-S "):
        codec.parse_assignment(text)


def test_a_path_must_lead_to_a_value() -> None:
    codec.check_path(Recipe, "model.mlp.activation.slope", "s")

    with pytest.raises(UsageError, match=r"^s: no knob 'train\.lr'; known here: iterations"):
        codec.check_path(Recipe, "train.lr", "s")
    with pytest.raises(UsageError, match=r"is a part, not a value; .* model\.unet\.init"):
        codec.check_path(Recipe, "model.unet", "s")


def test_absent_parts_leave_the_fingerprint_alone() -> None:
    spec = tiny.bare_model()

    assert "unet" not in codec.canonical(spec)
    assert codec.fingerprint(spec) != codec.fingerprint(replace(spec, unet=UNetSkips()))
    assert codec.fingerprint({"a": 1, "b": None}) == codec.fingerprint({"a": 1})


def test_a_whole_number_is_the_same_as_integer_and_as_float() -> None:
    as_integer = {"vocab_size": 9, "num_layers": 1, "dim": 16, "mlp": {"mult": 2}}
    as_float = as_integer | {"mlp": {"mult": 2.0}}

    one, other = (codec.parse(ModelSpec, data, "m") for data in (as_integer, as_float))

    assert codec.fingerprint(one) == codec.fingerprint(other)
    assert codec.fingerprint(as_integer) == codec.fingerprint(as_float)


def test_a_fingerprint_is_the_sha256_of_sorted_compact_json() -> None:
    expected = hashlib.sha256(b'{"a":[1,2.5],"b":"x"}').hexdigest()

    assert codec.fingerprint({"b": "x", "a": (1.0, 2.5)}) == expected


@settings(max_examples=20)
@given(recipes(), st.sampled_from(["name", "evaluate"]))
def test_a_changed_spec_has_another_fingerprint(recipe: Recipe, part: str) -> None:
    changed = {
        "name": replace(recipe, name=recipe.name + "x"),
        "evaluate": replace(
            recipe, evaluate=replace(recipe.evaluate, window=recipe.evaluate.window + 1)
        ),
    }[part]

    assert codec.fingerprint(changed) != codec.fingerprint(recipe)


def test_flatten_gives_dotted_leaves_and_true_for_a_part_without_fields() -> None:
    flat = codec.flatten({"a": {"b": 1, "c": {}, "d": None}, "e": [1, 2]})

    assert flat == {"a.b": 1, "a.c": True, "e": [1, 2]}


def test_the_json_schema_closes_every_part_to_unknown_keys() -> None:
    schema = codec.json_schema(Recipe)

    assert all(part["additionalProperties"] is False for part in schema["$defs"].values())
