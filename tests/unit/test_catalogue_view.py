"""Finding a sweep by what a user remembers of it, and recipes by what is known of them."""

import os
from pathlib import Path

import pytest

from service.catalogue_view import recipe_rows
from service.ledger import Ledger
from service.paths import Paths, find_sweep
from trainer.errors import UsageError
from tune_spaces import catalogue


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = Paths(tmp_path)
    for age, sweep in enumerate(["micro-aaaa", "micro-bbbb", "micro-large-cccc"]):
        ledger = paths.sweep(sweep).ledger
        with Ledger(ledger) as writer:
            writer.append("sweep_started", sweep_id=sweep)
        os.utime(ledger, (age, age))
    return paths


@pytest.mark.parametrize(
    ("ref", "found"),
    [
        (None, "micro-large-cccc"),
        ("micro-aaaa", "micro-aaaa"),
        ("micro-b", "micro-bbbb"),
        ("micro", "micro-bbbb"),
        ("micro-large", "micro-large-cccc"),
    ],
)
def test_a_sweep_is_found_by_id_start_or_name_the_newest_first(paths, ref, found):
    assert find_sweep(paths, ref).root.name == found


def test_a_start_that_fits_several_sweeps_lists_them(paths):
    with pytest.raises(UsageError, match="fits 3 sweeps: micro-aaaa, micro-bbbb"):
        find_sweep(paths, "mic")


def test_an_unknown_sweep_is_refused_with_a_suggestion(paths):
    with pytest.raises(UsageError, match="did you mean micro-aaaa"):
        find_sweep(paths, "mikro-aaaa")


def test_every_shipped_recipe_is_listed_with_its_size_and_its_verdict() -> None:
    rows = {row["recipe"]: row for row in recipe_rows(None)}

    assert list(rows) == catalogue.names("recipes")
    assert rows["pr414"]["num_params"] == 26_993_756
    assert 15e6 < rows["pr414"]["forecast_bytes"] < 16e6
    verdicts = {name: rows[name]["legal"] for name in ("pr414", "pr951", "pr610", "pr414-tiny")}
    assert verdicts == {
        "pr414": "yes",
        "pr951": "over the cap",
        "pr610": "over the clock",
        "pr414-tiny": "a toy",
    }
    assert rows["pr348"]["description"].startswith("10 layers, a bigram hash")


def test_a_recipe_by_name_is_shown_whole() -> None:
    shown = recipe_rows("pr610-tiny")

    assert shown["name"] == "pr610-tiny"
    assert shown["model"]["bigram"] == {"num_buckets": 256, "dim": 16}  # its own
    assert shown["model"]["dim"] == 64  # of the scale
    assert shown["model"]["mlp"]["activation"]["kind"] == "leaky_relu2"  # of pr610
    assert shown["model"]["ln_scale"] == {}  # of pr414
    assert "extends" not in shown


def test_a_card_that_lacks_a_bullet_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    cards = "# Cards\n\n## own\n\n* Source: a place\n* Claim: something,\n  and more\n\n## other\n"
    (tmp_path / "recipes/README.md").write_text(cards, encoding="utf-8")
    monkeypatch.setattr(catalogue, "files", lambda _: tmp_path)

    assert catalogue.cards() == {
        "own": {"source": "a place", "claim": "something, and more"},
        "other": {},
    }
    with pytest.raises(UsageError, match="the card of own has no found, legal, forecast, param"):
        catalogue.card("own")
