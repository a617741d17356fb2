"""`fairway audit` of a final: what was recorded, what probes find, how a profile reads it."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from service.cli import app
from tests import tiny
from trainer.codec import dump
from trainer.errors import DataError, InfeasibleError, UsageError
from trainer.evaluate.profiles import PROBED, REQUIRED
from trainer.finalize.artifact import write_weights
from trainer.finalize.stored import Floats
from trainer.liveness.probe import awake
from trainer.protocol import UNKNOWN_TOKENIZER
from trainer.results import Rule
from trainer.runtime.files import write_json
from trainer.specs.final import Zstd
from trainer.specs.task import final_task

RECORDED = tuple(
    Rule(id=name, verdict="pass", detail="recorded", source="us")
    for name in REQUIRED
    if name not in ("causality", "normalisation")
)
ONLY_PROBED = [name for name in PROBED if name not in {rule.id for rule in RECORDED}]


def write_final(
    home: Path, *rules: Rule, evaluate: dict[str, Any] | None = None, weights: bool = True
) -> Path:
    """Leave what the audit reads of a finished final."""
    folder = home / "store" / "finals" / "abc123"
    (folder / "artifact").mkdir(parents=True)
    asked = tiny.recipe({f"evaluate.{path}": value for path, value in (evaluate or {}).items()})
    write_json(folder / "task.json", dump(final_task(asked)))
    write_json(folder / "audit.json", dump(rules or RECORDED))
    write_json(folder / "result.json", {})
    if weights:
        model = tiny.bare_model(vocab_size=36, num_layers=1, dim=16)
        tensors = {name: Floats(tensor) for name, tensor in awake(model).state_dict().items()}
        path = folder / "artifact" / "weights.fw"
        write_weights(path, model, tensors, Zstd(level=1), UNKNOWN_TOKENIZER)
    return folder


def audit(home: Path, *words: object) -> Result:
    return CliRunner().invoke(app, ["audit", *map(str, words), "--home", str(home)])


def document(home: Path, *words: object) -> dict[str, Any]:
    return json.loads(audit(home, "abc", *words, "-o", "json").stdout)


def test_a_lawful_final_is_legal_with_every_rule_recorded_or_probed(tmp_path):
    write_final(tmp_path)

    shown = document(tmp_path)

    assert (shown["profile"], shown["legal"]) == ("community", True)
    assert [rule["id"] for rule in shown["rules"]] == [
        *(rule.id for rule in RECORDED),
        *ONLY_PROBED,
    ]
    verdicts = {rule["id"]: rule["verdict"] for rule in shown["rules"]}
    assert verdicts.pop("previous-document") == "not checked"
    assert set(verdicts.values()) == {"pass"}
    assert set(shown["rules"][0]) == {"id", "verdict", "detail", "source", "contested"}
    by_id = {rule["id"]: rule["detail"] for rule in shown["rules"]}
    assert by_id["coverage"].startswith("recorded; probed: ")


def test_a_lawful_final_passes_the_strict_profile_and_shows_it_as_a_table(tmp_path):
    folder = write_final(tmp_path)

    result = audit(tmp_path, folder / "artifact", "--profile", "strict", "--limit", "64")

    assert result.exit_code == 0, result.exception
    assert "pass         normalisation        the model's probabilities" in result.stdout


def test_a_final_is_found_by_either_of_its_folders(tmp_path):
    folder = write_final(tmp_path)

    places = ("abc", folder, folder / "artifact")
    tables = [audit(tmp_path, place, "--no-probe").stdout for place in places]

    assert tables[0] == tables[1] == tables[2]
    assert "pass         clocks               recorded" in tables[0]


def test_an_oracle_is_caught_by_the_probes_whatever_was_recorded(tmp_path):
    write_final(tmp_path, evaluate={"ttt": {"kind": "oracle", "optimizer": "sgd", "lr": 0.05}})

    result = audit(tmp_path, "abc", "-o", "json")

    assert isinstance(result.exception, InfeasibleError)
    assert str(result.exception).startswith("abc: audit score-before-update: recorded; probed: ")
    assert not json.loads(result.stdout)["legal"]


def test_without_probes_the_audit_is_what_was_recorded(tmp_path):
    write_final(tmp_path)

    shown = document(tmp_path, "--no-probe")

    assert shown["rules"] == dump(RECORDED)
    assert shown["legal"]


def test_what_is_contested_and_what_is_missing_exit_with_three_under_the_strict_profile(tmp_path):
    order = Rule(
        id="evaluation-order", verdict="pass", detail="longest", source="us", contested=True
    )
    write_final(tmp_path, order)

    community = audit(tmp_path, "abc", "--no-probe")
    strict = audit(tmp_path, "abc", "--no-probe", "--profile", "strict", "-o", "json")

    assert community.exit_code == 0
    assert "contested, the profile strict fails it: longest" in community.stdout
    assert isinstance(strict.exception, InfeasibleError)
    assert strict.exception.exit_code == 3
    shown = {rule["id"]: rule for rule in json.loads(strict.stdout)["rules"]}
    assert shown["evaluation-order"]["detail"] == "contested: longest"
    assert shown["causality"]["detail"] == "not checked: not applied"


def test_a_final_without_its_weights_or_of_an_older_spec_says_what_was_not_probed(tmp_path):
    folder = write_final(tmp_path, weights=False)
    gone = document(tmp_path)
    write_json(folder / "task.json", {"entry": "raw", "colour": 3})
    (folder / "artifact" / "weights.fw").touch()
    older = document(tmp_path)

    for shown, why in ((gone, "weights.fw: no such file to run"), (older, "another version")):
        rules = {rule["id"]: rule for rule in shown["rules"]}
        assert [rules[name]["verdict"] for name in ONLY_PROBED] == ["not checked"] * 4
        assert why in rules["causality"]["detail"]
        assert rules["coverage"]["verdict"] == "pass"


def test_broken_weights_are_an_error_of_one_line(tmp_path):
    folder = write_final(tmp_path, weights=False)
    (folder / "artifact" / "weights.fw").write_bytes(b"broken")

    result = audit(tmp_path, "abc")

    assert isinstance(result.exception, DataError)
    assert str(result.exception).startswith(str(folder / "artifact" / "weights.fw"))
    assert "\n" not in str(result.exception)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nothing",), "nothing: no such artifact"),
        (("abc", "-S", "train.seed=1"), "-S: a finished final is audited as it is"),
        (("abc", "--limit", "9"), "9 tokens: the probes' text has 64 to"),
        (("tiny", "--liveness", "--profile", "strict"), "--profile, --probe and --limit: they"),
        (("tiny", "--liveness", "--no-probe"), "--profile, --probe and --limit: they"),
    ],
)
def test_what_cannot_be_asked_is_a_usage_error(tmp_path, words, said):
    write_final(tmp_path)

    result = audit(tmp_path, *words)

    assert isinstance(result.exception, UsageError), result.exception
    assert str(result.exception).startswith(said)


def test_a_failed_rule_that_was_recorded_is_named(tmp_path):
    failed = Rule(id="coverage", verdict="fail", detail="3 not scored", source="techniques 1.5")
    write_final(tmp_path, failed)

    result = audit(tmp_path, "abc", "--no-probe")

    assert isinstance(result.exception, InfeasibleError)
    assert str(result.exception) == "abc: audit coverage: 3 not scored"
    assert result.stdout.split() == ["fail", "coverage", "3", "not", "scored"]
