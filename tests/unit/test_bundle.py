"""A sweep file goes to a service with all that it names on this machine."""

from pathlib import Path

import pytest

from service.bundle import read_bundle
from trainer.codec import read_recipe, read_yaml
from trainer.errors import UsageError
from tune_spaces.catalogue import find

SWEEP = "version: 1\nname: mine\nrecipe: {recipe}\n{more}"


def write(folder: Path, recipe: str, more: str = "") -> Path:
    path = folder / "sweep.yaml"
    path.write_text(SWEEP.format(recipe=recipe, more=more))
    return path


def test_a_shipped_sweep_goes_as_its_text_alone() -> None:
    bundle = read_bundle("quickstart")

    assert bundle.sweep == find("sweeps", "quickstart", "").read_text()
    assert bundle.files == {}


def test_a_recipe_of_this_machine_goes_with_everything_it_extends(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("train: {iterations: 5, seed: 1}\n")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: base\ntrain: {iterations: 7}\n")

    bundle = read_bundle(write(tmp_path, str(recipe)))

    assert read_yaml(bundle.sweep, "")["recipe"] == "mine.yaml"
    sent = read_yaml(bundle.files["mine.yaml"], "")
    assert sent == read_recipe(recipe) == {"train": {"iterations": 7, "seed": 1}}


def test_a_recipe_beside_the_working_folder_keeps_the_sweep_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("train: {iterations: 7}\n")
    path = write(tmp_path, "mine.yaml")

    assert read_bundle(path).sweep == path.read_text()


def test_a_clock_policy_and_a_baseline_of_this_machine_go_too(tmp_path: Path) -> None:
    (tmp_path / "clocks.yaml").write_text("name: ours\n")
    (tmp_path / "held.yaml").write_text("name: held\n")
    more = f"clocks: {tmp_path}/clocks.yaml\ngate: {{baseline: {tmp_path}/held.yaml}}\n"

    bundle = read_bundle(write(tmp_path, "tiny", more))

    data = read_yaml(bundle.sweep, "")
    assert (data["clocks"], data["gate"]["baseline"]) == ("clocks.yaml", "held.yaml")
    assert set(bundle.files) == {"clocks.yaml", "held.yaml"}


def test_shipped_names_and_sweeps_of_the_service_stay_names(tmp_path: Path) -> None:
    path = write(tmp_path, "tiny", "gate: {baseline: an-earlier-sweep}\n")

    bundle = read_bundle(path)

    assert bundle.sweep == path.read_text()
    assert bundle.files == {}


def test_a_file_that_is_not_there_is_named_with_its_field(tmp_path: Path) -> None:
    path = write(tmp_path, "tiny", f"clocks: {tmp_path}/none.yaml\n")

    with pytest.raises(UsageError, match=r"sweep\.yaml: clocks: .*none\.yaml is not a readable"):
        read_bundle(path)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "x.yaml").write_text("train: {iterations: 7}\n")
    (tmp_path / "one" / "x.yaml").write_text("name: ours\n")
    path = write(tmp_path, f"{tmp_path}/x.yaml", f"clocks: {tmp_path}/one/x.yaml\n")

    with pytest.raises(UsageError, match=r"two files are named x\.yaml; rename"):
        read_bundle(path)
