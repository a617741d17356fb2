"""`fairway replay`: a recorded final run again elsewhere, and held against what was recorded."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service.cli import app
from service.paths import Paths
from service.references import find_sheet
from service.sheet import Sheet, read_sheet, sheet_document, write_sheet
from tests.scored import Scored, scored_home
from trainer.codec import to_yaml
from trainer.errors import UsageError
from trainer.runtime.files import sha256_file, write_text

# Two warmdowns leave one trunk: what is replayed from step 0 was trained from its state.
SWEEP = """\
name: scored
recipe: {recipe}
space:
  train.schedule.warmdown_iters: {{phase: train, values: [2, 4]}}
seeds: {{search: [7]}}
constraints: [artifact_bytes <= 1_000_000, audit == pass]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Scored:
    root = tmp_path_factory.mktemp("scored")
    return scored_home(root, SWEEP, {"train.iterations": 8, "final.average": "ema"})


@pytest.fixture
def sheet(home: Scored) -> Sheet:
    return read_sheet(home.sheet(home.finals()[0]))


def replay(home: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """The real command line, on a home of its own."""
    command = [sys.executable, "-m", "service", "replay", *map(str, words)]
    return subprocess.run(
        [*command, "--home", str(home), "-o", "json"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )


def refusal(home: Path, *words: object) -> str:
    """What the command line says in this process, where nothing is to be run."""
    done = CliRunner().invoke(app, ["replay", *map(str, words), "--home", str(home)])
    assert isinstance(done.exception, UsageError)
    assert done.exception.exit_code == 2
    assert done.stdout == ""
    return str(done.exception)


def edited(sheet: Sheet, place: Path, **facts: Any) -> Path:
    """The sheet of a final that was written with other libraries."""
    document = sheet_document(sheet)
    document["final_worker"] |= facts
    write_text(place / "sheet.json", json.dumps(document))
    return place / "sheet.json"


def test_a_replay_on_a_clean_home_gives_the_same_artifact(
    home: Scored, sheet: Sheet, tmp_path: Path
) -> None:
    write_sheet(tmp_path / "sheet.json", sheet)
    assert sheet.branch is not None  # it came from a trunk

    done = replay(
        tmp_path / "clean", tmp_path, "--data", home.dataset.folder, "--keep", tmp_path / "kept"
    )

    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    weights = Path("finals", sheet.final, "artifact", "weights.fw")
    assert document["same"]
    assert document["recorded"] == document["replayed"]
    assert sha256_file(tmp_path / "kept" / weights) == sha256_file(home.paths.store / weights)


def test_one_changed_byte_in_the_data_refuses_by_file(
    home: Scored, sheet: Sheet, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for path in home.dataset.folder.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    with (data / "tiny_val_000000.bin").open("r+b") as file:
        last = file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(last)
        file.write(bytes([byte ^ 1]))
    place = home.sheet(sheet.final)

    refused = refusal(tmp_path / "clean", place, "--data", data, "--keep", tmp_path / "kept")

    assert "data: tiny_val_000000.bin sha256 " in refused
    assert not (tmp_path / "kept").exists()


def test_another_compressor_refuses_by_name(home: Scored, sheet: Sheet, tmp_path: Path) -> None:
    refused = refusal(home.paths.home, edited(sheet, tmp_path, libzstd="1.5.5"))

    assert "libzstd: 1.5.5 (final) → " in refused


def test_another_seed_is_named_and_does_not_give_the_same(
    home: Scored, sheet: Sheet, tmp_path: Path
) -> None:
    start = sheet.final[:8]

    refused = refusal(home.paths.home, start, "-S", "train.seed=8")
    allowed = replay(home.paths.home, start, "-S", "train.seed=8", "--allow", "seed")

    assert "seed: 7 → 8" in refused
    assert allowed.returncode == 3
    assert not json.loads(allowed.stdout)["same"]
    assert "weights_sha256" in allowed.stderr
    assert "what differs here: seed: 7 → 8" in allowed.stderr


def test_a_folder_that_holds_something_is_not_kept_in(home: Scored, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()

    refused = refusal(home.paths.home, "scored", "--keep", tmp_path)

    assert "holds something already" in refused


def test_the_recipe_of_a_sheet_gives_the_same_weights_without_the_service(
    home: Scored, sheet: Sheet, tmp_path: Path
) -> None:
    write_text(tmp_path / "recipe.yaml", to_yaml(sheet.recipe))
    words = ["recipe.yaml", "--data", str(home.dataset.folder), "-o", "out"]

    done = subprocess.run(
        [sys.executable, "-m", "trainer", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["weights_sha256"] == sheet.result.weights_sha256


def test_a_replay_is_a_run_in_mlflow_and_can_be_replayed_from_there(
    home: Scored, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    from service.replay_run import write_run

    sheet = read_sheet(home.sheet(home.finals()[1]))
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    replayed = {"val_bpb": 1.5, "artifact_bytes": 9, "steps": 8}
    document = {"same": True, "verdict": "the same bytes", "replayed": replayed}

    run_id = write_run(Paths(tmp_path), uri, sheet, document)

    run = MlflowClient(uri).get_run(run_id)
    assert run.data.tags["replay.of"] == sheet.final
    assert run.data.metrics["final/val_bpb"] == 1.5
    assert run.info.status == "FINISHED"
    assert find_sheet(Paths(tmp_path), f"mlflow:{run_id}") == sheet
