"""The run sheet: complete, from recorded files only, and strict to read."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from service.export import find_configuration
from service.facts import DriverFacts, read_facts, write_facts
from service.references import find_final, find_sheet
from service.replay import Spread, prepare
from service.report import best
from service.runs import final_run, training_run
from service.sheet import (
    Noise,
    Sheet,
    Sheets,
    find_origin,
    read_sheet,
    recipe_of,
    sheet_document,
    sheet_of,
    write_sheet,
)
from service.tasks import run_final
from tests import tiny
from tests.ledgers import CLIP
from tests.scored import Scored, scored_home
from tests.seeded import Seeded
from trainer.codec import dump
from trainer.data.shards import Dataset
from trainer.errors import DataError, UsageError
from trainer.runtime.files import read_json, sha256_file, write_json, write_text
from trainer.specs.task import final_task, train_task

SWEEP = """\
name: scored
recipe: {recipe}
space:
  train.averages.ema_decay: {{phase: bank, values: [0.5, 0.9]}}
seeds: {{search: [7, 8]}}
constraints: [artifact_bytes <= 1_000_000, audit == pass]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Scored:
    """Two seeds, two decays of the bank of each."""
    root = tmp_path_factory.mktemp("scored")
    return scored_home(root, SWEEP, {"final.average": "ema"})


@pytest.fixture
def sheet(home: Scored) -> Sheet:
    return read_sheet(home.sheet(home.finals()[0]))


def test_every_scored_final_has_a_sheet(home: Scored) -> None:
    assert len(home.finals()) == 4
    assert all(read_sheet(home.sheet(final)).final == final for final in home.finals())


def test_every_stage_says_what_it_was_computed_with(home: Scored) -> None:
    stages = [path.parent for path in home.paths.store.glob("*/*/result.json")]

    silent = [str(folder) for folder in stages if not (folder / "facts.json").is_file()]

    assert len(stages) > 8
    assert not silent


def test_a_sheet_tells_what_the_stages_recorded(home: Scored, sheet: Sheet) -> None:
    final = home.paths.store / "finals" / sheet.final
    training = home.paths.store / "trainings" / sheet.training
    result, trained = read_json(final / "result.json"), read_json(training / "result.json")

    told = sheet_document(sheet)

    assert told["final_task"] == read_json(final / "task.json")
    assert told["train_task"] == read_json(training / "task.json")
    assert sheet.result.weights_sha256 == sha256_file(final / "artifact" / "weights.fw")
    assert sheet.result.artifact_bytes == sum(
        path.stat().st_size for path in (final / "artifact").iterdir()
    )
    assert sheet.result.val_bpb == result["score"]["val_bpb"]
    assert sheet.result.steps == trained["steps"]
    assert [each.id for each in sheet.result.audit] == [each["id"] for each in result["audit"]]
    assert sheet.final_worker is not None
    assert sheet.code_digest == sheet.final_worker.code_digest


def test_a_sheet_lists_every_file_of_the_data(home: Scored, sheet: Sheet) -> None:
    folder = home.dataset.folder

    listed = {file.name: (file.bytes, file.sha256) for file in sheet.data.files}

    assert listed == {
        path.name: (path.stat().st_size, sha256_file(path)) for path in folder.glob("*.bin")
    }
    assert sheet.data.digest == home.dataset.digest
    assert {split.name: split.documents for split in sheet.data.splits}["val"] == (
        home.dataset.num_documents("val")
    )


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"final.average": "ema"},
        {"final.average": "swa"},
        {"train.averages": {"ema_decay": 0.9965, "ema_bank": [0.995]}, "final.average": "ema"},
    ],
)
def test_the_recipe_of_a_sheet_asks_for_the_very_tasks(
    tiny_dataset: Dataset, values: dict[str, Any]
) -> None:
    recipe = tiny.recipe(values)
    train, final = train_task(recipe), final_task(recipe)

    made = recipe_of(train, final, recipe.name, tiny_dataset)

    assert (train_task(made), final_task(made)) == (train, final)


def test_a_sheet_made_again_is_the_one_that_was_written(home: Scored, tmp_path: Path) -> None:
    final = home.finals()[-1]
    written = home.sheet(final)
    kept = shutil.move(written, tmp_path / "sheet.json")

    made = sheet_of(home.paths, final)

    shutil.move(kept, written)
    assert replace(made, noise=replace(made.noise, sd_bpb=None, df=None)) == read_sheet(written)


def test_a_final_that_is_found_gets_the_sheet_of_the_run_that_computed_it(home: Scored) -> None:
    final = home.finals()[1]
    before = home.sheet(final).read_text()
    home.sheet(final).unlink()
    met_again = replace(find_origin(home.paths, final), facts={"git_commit": "of another run"})

    Sheets(home.paths, home.dataset).leave(met_again, was_found=True)

    assert home.sheet(final).read_text() == before


def test_a_final_that_nobody_is_known_to_have_computed_has_no_drivers_facts(
    home: Scored, tmp_path: Path
) -> None:
    final = home.finals()[1]
    origin = find_origin(home.paths, final)
    copy = replace(home.paths, home=tmp_path / "home")
    shutil.copytree(home.paths.store, copy.store)
    path = copy.store / "finals" / final / "sheet.json"
    path.unlink()

    Sheets(copy, home.dataset).leave(origin, was_found=True)

    assert read_sheet(path).driver == DriverFacts()


def test_the_noise_is_that_of_the_sweeps_seeds(home: Scored) -> None:
    first = home.finals()[0]
    bpb = {final: sheet_of(home.paths, final).result.val_bpb for final in home.finals()}

    noise = sheet_of(home.paths, first).noise

    assert noise.df == 1
    assert noise.sd_bpb is not None
    assert 0 < noise.sd_bpb <= max(bpb.values()) - min(bpb.values())


def test_noise_that_the_home_has_measured_comes_before_the_sheets(
    home: Scored, sheet: Sheet
) -> None:
    measured = sheet_of(home.paths, sheet.final).noise
    edited = replace(sheet, noise=Noise(sd_bpb=50.0, df=9))

    noise = prepare(home.paths, edited, None).noise

    assert measured.sd_bpb is not None
    assert noise == Spread(measured.sd_bpb, 1, "the sweep's seeds")


def test_a_score_that_another_machine_began_is_told_with_both(
    home: Scored, sheet: Sheet, tmp_path: Path
) -> None:
    copy = replace(home.paths, home=tmp_path / "home")
    shutil.copytree(home.paths.home, copy.home)
    folder = copy.store / "finals" / sheet.final
    for name in ("result.json", "sheet.json"):
        (folder / name).unlink()
    begun = read_facts(folder)
    assert begun is not None
    write_facts(folder, replace(begun, torch="2.9.1"))
    write_text(folder / "journal" / "left" / "000000-0.npz", "what it has scored so far")

    run_final(
        {"store": str(copy.store), "data": str(home.dataset.folder), "training": sheet.training,
         "final": sheet.final, "artifact": sheet.final, "hessians": sheet.final,
         "task": dump(sheet.final_task), "cpus": 1, "device": "cpu"}
    )  # fmt: skip

    worker = sheet_of(copy, sheet.final).final_worker
    assert worker is not None
    assert worker.torch == "2.9.1"
    assert [each.torch for each in worker.resumed] == [torch.__version__]


def test_a_sheet_is_read_as_it_was_written(sheet: Sheet, tmp_path: Path) -> None:
    write_sheet(tmp_path / "sheet.json", sheet)

    assert read_sheet(tmp_path) == sheet


def test_facts_that_were_not_recorded_are_null_in_the_file(sheet: Sheet) -> None:
    document = sheet_document(replace(sheet, train_worker=None))

    assert document["train_worker"] is None
    assert document["driver"]["image_digest"] is None


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (("colour",), "red", "colour: unknown key"),
        (("seed",), "7", 'seed: got "7"'),
        (("seed",), None, "seed: "),
        (("result", "val_bpb"), "1.1", "result.val_bpb: got"),
        (("result", "val_bqb"), 1.1, "result.val_bqb: unknown key; did you mean val_bpb"),
        (("data", "files"), [{"name": "x"}], r"data.files\[0\].split: missing"),
        (("final_worker", "libzstd"), 15, "final_worker.libzstd: got 15"),
        (("recipe", "model", "dim"), 31, "recipe.model"),
        (("version",), 2, "version: got 2"),
        (("threads",), 0, "threads=0 must be above 0"),
        (("noise",), {"sd_bpb": 0.001, "df": 0}, "noise: df=0 must be above 0"),
        (("noise",), {"sd_bpb": 0.001}, "noise: give both sd_bpb and df"),
        (("final",), "../../etc", "final='../../etc' is no plain name"),
        (("data", "name"), "..", r"data: name='\.\.' is no plain name"),
    ],
)
def test_a_wrong_sheet_is_refused_by_file_and_field(
    sheet: Sheet, tmp_path: Path, path: tuple[str, ...], value: Any, fault: str
) -> None:
    document = sheet_document(sheet)
    *parts, last = path
    place = document
    for part in parts:
        place = place[part]
    place[last] = value
    file = tmp_path / "sheet.json"
    write_json(file, document)

    with pytest.raises(DataError, match=rf"sheet\.json: {fault}") as caught:
        read_sheet(file)

    assert len(str(caught.value).splitlines()) == 1


def test_a_file_name_that_leads_elsewhere_is_refused(sheet: Sheet, tmp_path: Path) -> None:
    document = sheet_document(sheet)
    document["data"]["files"][0]["name"] = "../../../etc/passwd"
    write_json(tmp_path / "sheet.json", document)

    with pytest.raises(DataError, match="is no plain name"):
        read_sheet(tmp_path)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "not readable as JSON"),
        ("[]", "expected a JSON object"),
        ("[" * 100_000, "nested too deeply|not readable as JSON"),
        ('{"version": NaN}', "version: got"),
        ("\xff", "not readable as JSON|expected"),
    ],
)
def test_what_is_no_sheet_is_refused_in_one_line(tmp_path: Path, text: str, fault: str) -> None:
    file = tmp_path / "sheet.json"
    file.write_bytes(text.encode("latin-1"))

    with pytest.raises(DataError, match=fault) as caught:
        read_sheet(file)

    assert str(caught.value).startswith(str(file))
    assert len(str(caught.value).splitlines()) == 1


def test_a_sheet_of_another_spec_says_so(sheet: Sheet, tmp_path: Path) -> None:
    document = sheet_document(sheet)
    document["spec_version"] = 2
    document["recipe"]["train"]["gone"] = 1
    write_json(tmp_path / "sheet.json", document)

    with pytest.raises(DataError, match=r"gone: unknown key.*of spec version 2, this code reads"):
        read_sheet(tmp_path)


def test_a_final_goes_by_its_id_a_start_of_it_or_its_sweep(home: Scored) -> None:
    first = home.finals()[0]
    top = best(home.view())

    assert top is not None
    assert find_final(home.paths, first) == first
    assert find_final(home.paths, first[:9]) == first
    assert find_final(home.paths, "scored") == top["final"]
    assert find_final(home.paths, home.sweep_id) == top["final"]


def test_a_word_that_fits_a_sweep_and_a_final_means_the_sweep_to_every_verb(
    home: Scored, tmp_path: Path
) -> None:
    copy = replace(home.paths, home=tmp_path / "home")
    shutil.copytree(home.paths.home, copy.home)
    word = home.finals()[0][:6]
    sweep = Seeded(copy.home, sweep_id=f"{word}-3f9a2c")
    [final] = sweep.add("search", {CLIP: "none"}, {1: 1.1})

    assert find_final(copy, word) == final
    assert find_configuration(copy, word).chosen["final"] == final


def test_a_final_whose_ledger_is_gone_is_replayed_and_not_exported(
    home: Scored, sheet: Sheet, tmp_path: Path
) -> None:
    copy = replace(home.paths, home=tmp_path / "home")
    shutil.copytree(home.paths.store, copy.store)

    assert find_sheet(copy, sheet.final[:9]) == sheet
    with pytest.raises(UsageError, match=r"no sweep of .* tells of it"):
        find_configuration(copy, sheet.final[:9])


@pytest.mark.parametrize("ref", ["nothing", ""])
def test_what_names_no_final_is_refused_in_one_line(home: Scored, ref: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_final(home.paths, ref)

    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_with_a_sheet_of_each_seed_asks_which(
    home: Scored, sheet: Sheet, tmp_path: Path
) -> None:
    for seed in (7, 8):
        write_sheet(tmp_path / f"sheet_seed{seed}.json", sheet)

    with pytest.raises(UsageError, match=r"sheet_seed7\.json, sheet_seed8\.json; name the file"):
        find_sheet(home.paths, str(tmp_path))

    assert find_sheet(home.paths, str(tmp_path / "sheet_seed7.json")) == sheet


def test_a_run_in_mlflow_carries_the_sheet_and_short_tags(home: Scored) -> None:
    view = home.view()
    event = next(iter(view.finals.values()))

    run = final_run(view, event, home.paths)

    assert home.sheet(event["final"]) in run.files
    assert run.tags["fairway.zstandard"] == run.worker["zstandard"]
    assert run.tags["fairway.attention"] == run.worker["attention"]
    assert all(len(value) < 250 for value in run.tags.values())


def test_a_run_in_mlflow_names_the_gpus_of_the_gang(home: Scored, tmp_path: Path) -> None:
    view, copy = home.view(), replace(home.paths, home=tmp_path / "home")
    shutil.copytree(home.paths.home, copy.home)
    event = next(iter(view.trainings.values()))
    path = copy.store / "trainings" / event["training"] / "facts.json"
    gpus = [{"name": "NVIDIA H200", "uuid": f"GPU-{rank}"} for rank in range(8)]
    kernels = {"attention": "flash_attn_4", "flash_attn": "4.0.0b36", "fused": True}
    facts = {"gpus": gpus, "driver": "580.65", "triton": "3.6.0"} | kernels
    write_json(path, json.loads(path.read_text()) | facts)

    tags = training_run(view, event, copy).tags

    told = {name: tags[f"fairway.{name}"] for name in ("triton", *kernels)}
    assert told == {"triton": "3.6.0"} | kernels | {"fused": "True"}
    assert tags["fairway.gpu"] == "8 x NVIDIA H200"
    assert tags["fairway.driver"] == "580.65"


def test_the_facts_of_a_newer_fairway_do_not_keep_a_run_from_mlflow(
    home: Scored, tmp_path: Path
) -> None:
    view, copy = home.view(), replace(home.paths, home=tmp_path / "home")
    shutil.copytree(home.paths.home, copy.home)
    event = next(iter(view.trainings.values()))
    path = copy.store / "trainings" / event["training"] / "facts.json"
    write_json(path, {"device": "cpu", "qubits": 3, "torch": "3.0"})

    assert training_run(view, event, copy).tags["fairway.torch"] == "3.0"


def test_a_sheets_recipe_is_plain_data_that_the_trainer_takes(sheet: Sheet) -> None:
    assert tiny.recipe(dump(sheet.recipe)) == sheet.recipe
