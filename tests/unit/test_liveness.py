"""The liveness checks pass what is alive and catch what is not: one mutant a bug."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from service.cli import app
from tests.tiny import recipe, rich_model
from trainer.blueprint import blueprint
from trainer.codec import merge, parse, read_mapping
from trainer.errors import InfeasibleError
from trainer.finalize import artifact as weights_file
from trainer.finalize.code import code_files
from trainer.finalize.stored import restore
from trainer.liveness import scoring
from trainer.liveness.artifact import artifact_rules, size
from trainer.liveness.check import check_recipe
from trainer.liveness.parts import effect, flags, optional_parts
from trainer.liveness.training import compiled_rules, one_group, step_rules
from trainer.model import gpt as gpt_module
from trainer.model import stem
from trainer.model.attention import Xsa
from trainer.model.fake_quant import FakeQuant, FakeQuants
from trainer.model.rotary import Rotary
from trainer.model.stem import HashEmbedding, SmearV1
from trainer.optim.averages import AverageBank
from trainer.optim.muon import Muon
from trainer.protocol import ARTIFACT_BYTES_CAP
from trainer.results import Rule
from trainer.specs.model import ModelSpec
from trainer.specs.recipe import Recipe
from trainer.specs.task import TrainTask, train_task
from tune_spaces.catalogue import find, load_recipe, names

TINY = [name for name in names("recipes") if name.endswith("tiny")]
FULL = [name for name in names("recipes") if name not in TINY]


def shipped(name: str) -> Recipe:
    return parse(Recipe, load_recipe(name, "recipes"), name)


def small(described: str) -> Recipe:
    """The described form of a recipe at the size of the recipe's own small form."""
    own = find("recipes", described.replace("as-described", "tiny"), "recipes")
    sizes = (own.parent / "scales" / "tiny.yaml", own)
    data = load_recipe(described, "recipes")
    for path in sizes:
        top = read_mapping(path)
        data = merge(data, {key: top[key] for key in top if key not in ("name", "extends")})
    return parse(Recipe, data, described)


def by_id(rules: list[Rule] | tuple[Rule, ...]) -> dict[str, Rule]:
    return {rule.id: rule for rule in rules}


def model_of(**changes: Any) -> ModelSpec:
    """A small model with hashes, smear and XSA."""
    values: dict[str, Any] = {
        "model.smear": {"kind": "v1"},
        "model.bigram": {"num_buckets": 32, "dim": 8},
        "model.attention.xsa": {},
        "model.attention.rope.ntk_reference": 24,
    }
    return recipe(values | changes).model


def task_of(**values: Any) -> TrainTask:
    return train_task(recipe(values))


@pytest.mark.parametrize("name", TINY)
def test_everything_that_a_small_shipped_recipe_names_is_alive(name: str) -> None:
    rules = check_recipe(shipped(name))

    assert [rule for rule in rules if rule.verdict == "fail"] == []
    unchecked = {rule.id for rule in rules if rule.verdict == "not checked"}
    assert unchecked <= {"averages", "qat", "test-time-training"}
    assert ("qat" in unchecked) == (shipped(name).train.qat is None)


@pytest.mark.parametrize("name", [name for name in FULL if name.endswith("as-described")])
def test_everything_that_a_described_form_names_is_alive(name: str) -> None:
    rules = check_recipe(small(name))

    assert [rule for rule in rules if rule.verdict == "fail"] == []
    assert by_id(rules)["qat"].verdict == "pass"


@pytest.mark.parametrize("name", FULL)
def test_a_full_shipped_recipe_has_each_parameter_in_one_group_and_scores_each_token_once(
    name: str,
) -> None:
    full = shipped(name)

    rules = [one_group(train_task(full)), scoring.coverage(full.evaluate)]

    assert [rule.verdict for rule in rules] == ["pass", "pass"]


def test_every_optional_part_of_a_rich_model_acts() -> None:
    spec = rich_model()

    found = flags(spec)

    assert found.verdict == "pass", found.detail
    for path in (
        "smear", "trigram", "attention.xsa.last", "attention.rope.ntk_reference", "dtg",
        "unet.gate", "recurrence", "head", "mtp", "attention.shared_kv", "ln_scale.learned",
    ):  # fmt: skip
        assert f"{path} " in found.detail


def test_the_walk_names_what_a_spec_could_do_without_and_nothing_else() -> None:
    spec = recipe({"model.attention.rope.dims": 8, "model.unet.gate": {}}).model

    assert set(optional_parts(spec)) == {
        "attention.rope.dims", "attention.q_gain", "residual_scale", "x0_mix", "unet",
        "unet.gate", "softcap", "ortho_init",
    }  # fmt: skip


def test_a_scope_that_spans_everything_is_no_flag() -> None:
    spec = recipe({"model.attention.xsa.last": 2}).model

    assert blueprint(spec).layers[0].has_xsa
    assert effect(spec, "attention.xsa.last") is None
    assert effect(spec, "attention.xsa") > 1e-3  # type: ignore[operator]


def test_a_rich_model_trains_in_every_parameter() -> None:
    task = TrainTask(model=rich_model(), train=recipe().train, parity_window=32)

    found = by_id(step_rules(task))

    assert {rule.verdict for rule in found.values()} == {"pass"}, found


def test_keys_that_are_copied_instead_of_shared_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = recipe({"model.num_layers": 4, "model.attention.shared_kv": {}}).model
    alive = effect(spec, "attention.shared_kv")

    monkeypatch.setattr("trainer.blueprint._kv_owner", lambda spec, index: index)

    assert alive > 1e-3  # type: ignore[operator]
    assert effect(spec, "attention.shared_kv") == 0.0


def test_snapshots_that_are_never_taken_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(**{"train.averages.ema_decay": None, "train.averages.ema_bank": []})
    alive = by_id(step_rules(task))["averages"]

    monkeypatch.setattr("trainer.optim.averages.has_begun", lambda *when: False)
    dead = by_id(step_rules(task))["averages"]

    assert alive.detail.endswith(": swa")
    assert (alive.verdict, dead.verdict) == ("pass", "fail")
    assert dead.detail == "swa is missing from the bank"


def test_windows_that_score_the_tail_again_fail() -> None:
    found = scoring.coverage(recipe({"evaluate.variant": "A"}).evaluate)

    assert found.verdict == "fail"


def test_a_part_that_is_wired_to_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Xsa, "forward", lambda self, y, v: y)

    found = flags(model_of())

    assert found.verdict == "fail"
    assert "model.attention.xsa changes no loss" in found.detail
    assert "bigram" not in found.detail


def test_a_rule_that_acts_on_long_texts_only_is_tried_on_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert effect(model_of(), "attention.rope.ntk_reference") > 1e-4  # type: ignore[operator]
    alive = Rotary.__init__

    def without_ntk(self: Rotary, dims: int, base: float, ntk_reference: object = None) -> None:
        alive(self, dims, base)

    monkeypatch.setattr(Rotary, "__init__", without_ntk)

    assert "ntk_reference changes no loss" in flags(model_of()).detail


def test_parameters_without_gradient_or_update_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HashEmbedding, "forward", lambda self, x, tokens: x)

    found = by_id(step_rules(task_of(**{"model.bigram": {"num_buckets": 32, "dim": 8}})))

    assert found["one-group"].verdict == "pass"
    assert found["gradient"].verdict == "fail"
    assert "bigram.scale, bigram.table.weight, bigram.projection" in found["gradient"].detail
    assert "blocks" not in found["gradient"].detail
    assert "bigram.table.weight" in found["update"].detail


def test_an_optimizer_that_does_not_move_its_parameters_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Muon, "step", lambda self: None)

    found = by_id(step_rules(task_of()))

    assert found["update"].verdict == "fail"
    assert "blocks.0.attention.query.weight" in found["update"].detail
    assert "embedding" not in found["update"].detail


def test_a_parameter_that_no_optimizer_holds_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SmearV1, "ROLES", {})

    (found,) = check_recipe(recipe({"model.smear": {"kind": "v1"}}))

    assert (found.id, found.verdict) == ("one-group", "fail")
    assert "smear.gate" in found.detail


def test_an_average_that_stays_where_it_started_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AverageBank, "update", lambda self, *when: None)

    found = by_id(step_rules(task_of(**{"train.averages.swa": None})))["averages"]

    assert (found.verdict, found.detail) == ("fail", "ema-0.5 is the start; ema-0.9 is the start")


def test_a_smear_that_looks_ahead_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stem, "_before", lambda x: F.pad(x[:, 1:], (0, 0, 0, 1)))

    found = scoring.causality(model_of())

    assert found.verdict == "fail"
    assert scoring.causality(model_of(**{"model.smear": None})).verdict == "pass"


def test_losses_of_no_distribution_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = gpt_module.token_loss

    def flattered(logits: Tensor, targets: Tensor) -> Tensor:
        return honest(logits, targets) - 0.01 * (targets % 2 == 0)

    assert scoring.normalisation(model_of()).verdict == "pass"
    monkeypatch.setattr(gpt_module, "token_loss", flattered)

    assert scoring.normalisation(model_of()).verdict == "fail"


QAT = {"mlp_bits": 5, "attention_bits": 6, "start": {"lr_scale": 0.5}}


def test_late_fake_quantization_flips_within_one_graph() -> None:
    found = by_id(compiled_rules(task_of(**{"train.qat": QAT})))

    assert {rule.verdict for rule in found.values()} == {"pass"}, found


def test_fake_quantization_that_never_acts_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeQuant, "forward", lambda self, weight: weight)

    found = by_id(compiled_rules(task_of(**{"train.qat": QAT})))["qat"]

    assert found.verdict == "fail"
    assert "changes no training loss" in found.detail
    assert "on their grid" in found.detail


def test_a_switch_that_the_graph_cannot_hold_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def branching(self: FakeQuant, weight: Tensor) -> Tensor:
        return self.on_grid(weight.detach()) + weight * 0 if self.strength > 0 else weight

    monkeypatch.setattr(FakeQuant, "forward", branching)

    found = by_id(compiled_rules(task_of(**{"train.qat": QAT})))["no-recompilation"]

    assert found.verdict == "fail"
    assert "\n" not in found.detail


def test_a_switch_that_is_a_flag_of_python_costs_a_second_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def flagged(self: FakeQuant, weight: Tensor) -> Tensor:
        return weight + (self.on_grid(weight) - weight).detach() if FakeQuant.enabled else weight

    def turn_on(self: FakeQuants, step: int) -> None:
        FakeQuant.enabled = True

    monkeypatch.setattr(FakeQuant, "enabled", False, raising=False)
    monkeypatch.setattr(FakeQuant, "forward", flagged)
    monkeypatch.setattr(FakeQuants, "turn_on", turn_on)

    found = by_id(compiled_rules(task_of(**{"train.qat": QAT})))

    # Or never acts, where the compiler does not guard the flag.
    assert "fail" in {found["qat"].verdict, found["no-recompilation"].verdict}


def test_an_artifact_that_decodes_to_other_weights_is_caught(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = recipe({"final.prune": {"ratio": 0.1, "larger_than": 0}})
    honest = by_id(artifact_rules(asked.model, asked.final, tmp_path / "a"))["round-trip"]
    monkeypatch.setattr(weights_file, "restore", lambda stored: 1.01 * restore(stored))

    found = by_id(artifact_rules(asked.model, asked.final, tmp_path / "b"))["round-trip"]

    assert (honest.verdict, found.verdict) == ("pass", "fail")


def test_a_model_that_cannot_fit_fails_by_its_forecast() -> None:
    fits = size(ARTIFACT_BYTES_CAP - 90_000, 90_000)
    near, over = size(ARTIFACT_BYTES_CAP, 90_000), size(ARTIFACT_BYTES_CAP, 900_000)

    assert [rule.verdict for rule in (fits, near, over)] == ["pass", "not checked", "fail"]
    assert "over by 90,000: within the forecast's error" in near.detail
    assert "over by 900,000" in over.detail


def test_a_recipe_with_a_dead_part_exits_with_three_and_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Xsa, "forward", lambda self, y, v: y)

    result = CliRunner().invoke(app, ["audit", "--liveness", "pr414-tiny"])

    assert isinstance(result.exception, InfeasibleError)
    assert result.exception.exit_code == 3
    assert str(result.exception).startswith("pr414-tiny: audit flags: model.attention.xsa changes")
    assert "pass         one-group" in result.stdout


def test_the_verb_prints_every_rule_as_json() -> None:
    result = CliRunner().invoke(
        app, ["audit", "--liveness", "tiny", "-S", "model.num_layers=2", "-o", "json"]
    )

    assert result.exit_code == 0, result.output
    rules = json.loads(result.stdout)
    assert {"one-group", "flags", "causality", "round-trip"} <= {rule["id"] for rule in rules}
    assert set(rules[0]) == {"id", "verdict", "detail", "source", "contested"}


def test_the_checks_do_not_ship_with_an_artifact() -> None:
    assert not [name for name in code_files() if "liveness" in name]
