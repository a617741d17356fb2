"""`fairway replay`: a recorded final run again elsewhere, and held against what was recorded."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service import report
from service.cli import app
from service.facts import ROOT
from service.paths import Paths
from service.replay_run import sheet_of_run
from service.sheet import Sheet, read_sheet, sheet_document
from tests.scored import Scored, scored_home
from trainer.codec import to_yaml
from trainer.errors import BackendError, UsageError
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


# The command line, whose MLflow goes between the look that it is there and the last word to it.
LOSING = """\
from pathlib import Path
from service import replay_run
from service.cli import main

write_run = replay_run.write_run

def lose(*words):
    assert Path({database!r}).stat().st_size
    Path({database!r}).write_bytes(b"no database any more" * 100)
    return write_run(*words)

replay_run.write_run = lose
main()
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Scored:
    root = tmp_path_factory.mktemp("scored")
    return scored_home(root, SWEEP, {"train.iterations": 8, "final.average": "ema"})


@pytest.fixture
def sheet(home: Scored) -> Sheet:
    return read_sheet(home.sheet(home.finals()[0]))


def replay(
    home: Path, *words: object, code: Path = ROOT, program: Sequence[str] = ("-m", "service")
) -> subprocess.CompletedProcess[str]:
    """The real command line, on a home of its own."""
    command = [sys.executable, *program, "replay", *map(str, words)]
    return subprocess.run(
        [*command, "--home", str(home), "-o", "json"],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=code,
        env={**os.environ, "PYTHONPATH": str(code)},
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


def cloned(place: Path) -> Path:
    """The packages as somebody else has them: nothing of where the sweep ran."""
    for name in ("service", "trainer", "tune_spaces"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, place / name, ignore=ignored)
    return place


def test_a_replay_of_a_sweeps_best_on_a_clean_clone_gives_the_same_artifact(
    home: Scored, tmp_path: Path
) -> None:
    best = report.best(home.view())
    assert best is not None
    place = Path("finals", best["final"])
    bare = Paths(tmp_path / "bare")  # of all stages only what has been written about the best
    shutil.copytree(home.paths.sweeps, bare.sweeps)
    (bare.store / place).mkdir(parents=True)
    shutil.copy(home.paths.store / place / "sheet.json", bare.store / place)
    words = ["--data", home.dataset.folder, "--keep", tmp_path / "kept"]

    done = replay(bare.home, "scored", *words, code=cloned(tmp_path / "clone"))

    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    weights = place / "artifact" / "weights.fw"
    assert (document["final"], document["same"]) == (best["final"], True)
    assert document["recorded"] == document["replayed"]
    assert sha256_file(tmp_path / "kept" / weights) == sha256_file(home.paths.store / weights)


def test_an_allowed_other_compressor_goes_on_from_a_folder_with_a_sheet(
    home: Scored, sheet: Sheet, tmp_path: Path
) -> None:
    edited(sheet, tmp_path, libzstd="1.5.5")
    assert sheet.branch is not None  # it came from a trunk
    words = ["--data", home.dataset.folder, "--allow", "libzstd"]

    done = replay(tmp_path / "clean", tmp_path, *words)

    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["same"]
    assert [(each["name"], each["recorded"]) for each in document["allowed"]] == [
        ("libzstd", "1.5.5 (final)")
    ]


def test_a_result_is_printed_though_mlflow_is_lost_on_the_way(
    home: Scored, sheet: Sheet, tmp_path: Path
) -> None:
    database = tmp_path / "mlflow.db"
    words = [sheet.final, "--tracking-uri", f"sqlite:///{database}"]

    done = replay(home.paths.home, *words, program=["-c", LOSING.format(database=str(database))])

    assert done.returncode == BackendError.exit_code, done.stderr
    assert json.loads(done.stdout)["same"]
    assert "not_in_mlflow" in done.stderr


def test_a_server_that_does_not_answer_is_told_before_anything_is_trained(
    home: Scored, sheet: Sheet, tmp_path: Path
) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        words = ["--tracking-uri", uri, "--keep", str(tmp_path / "kept")]

        done = CliRunner().invoke(
            app, ["replay", sheet.final, *words, "--home", str(home.paths.home)]
        )

    assert isinstance(done.exception, BackendError)
    assert not (tmp_path / "kept").exists()


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
        timeout=500,
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
    assert sheet_of_run(Paths(tmp_path), f"mlflow:{run_id}", None) == sheet
