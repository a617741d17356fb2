"""`python -m trainer` without the service: what it writes, keeps and refuses."""

import json
import logging
import os
import shutil
import subprocess
import sys

import pytest

from tests import tiny
from trainer.__main__ import main
from trainer.codec import to_yaml
from trainer.data.prepare import prepare
from trainer.data.shards import load_dataset
from trainer.errors import DataError
from trainer.run import score_artifact
from trainer.runtime.distributed import Ranks
from trainer.specs.evaluate import EvaluateSpec


def trainer_alone(*arguments, cwd):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-m", "trainer", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=480,
    )


def write_recipe(path, values=None):
    path.write_text(to_yaml(tiny.recipe(values)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tiny_dataset, tmp_path_factory):
    """Walk the line once in a process of its own; return its folder and what it said."""
    folder = tmp_path_factory.mktemp("alone")
    recipe = write_recipe(folder / "recipe.yaml", {"final.average": "ema"})
    done = trainer_alone(recipe, "--data", tiny_dataset.folder, "-o", "out", cwd=folder)
    return folder, done


@pytest.fixture
def again(finished, tiny_dataset, tmp_path):
    """Copies of the finished folder and its dataset, to damage."""
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.copytree(tiny_dataset.folder, tmp_path / "data")
    return tmp_path


@pytest.fixture
def call(again, capsys):
    """Call the command line in this process: (exit status, stdout, lines on stderr)."""
    logger = logging.getLogger("trainer")
    before = (logger.handlers[:], logger.level, logger.propagate)

    def run(*extra):
        run_folder = again / "run"
        arguments = ["--data", str(again / "data"), "-o", str(run_folder / "out"), *extra]
        status = main([str(run_folder / "recipe.yaml"), *arguments])
        said = capsys.readouterr()
        return status, said.out, said.err.splitlines()

    yield run
    logger.handlers[:], logger.level, logger.propagate = before


def test_the_line_ends_in_a_result_on_stdout(finished):
    _, done = finished

    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["entry"] == "ema-0.9"
    assert 0 < result["score"]["val_bpb"] < 20
    verdicts = {rule["id"]: rule["verdict"] for rule in result["audit"]}
    assert {"coverage", "byte-accounting", "parity", "score-before-update"} <= set(verdicts)
    assert {name for name, verdict in verdicts.items() if verdict != "pass"} == {"clocks"}


def test_the_artifact_bytes_are_those_of_the_files_on_disk(finished):
    folder, done = finished

    result = json.loads(done.stdout)
    sizes = {path.name: path.stat().st_size for path in (folder / "out/final/artifact").iterdir()}

    assert result["artifact_bytes"] == sum(sizes.values())
    assert sizes == {"weights.fw": result["weights_bytes"], "code.pyz": result["code_bytes"]}
    assert json.loads((folder / "out/final/result.json").read_text(encoding="utf-8")) == result


def test_the_effective_recipe_is_written_and_runs_the_same(finished, again, call):
    folder, done = finished
    shutil.copy(folder / "out/effective.yaml", again / "run/recipe.yaml")

    status, out, _ = call()

    assert status == 0
    assert json.loads(out)["weights_sha256"] == json.loads(done.stdout)["weights_sha256"]


def test_a_second_call_keeps_the_training_and_gives_the_same_score(finished, again, call):
    kept = again / "run/out/training/result.json"
    before = kept.stat().st_mtime_ns

    status, out, _ = call()

    first = json.loads(finished[1].stdout)
    assert (status, kept.stat().st_mtime_ns) == (0, before)
    assert json.loads(out)["score"]["val_bpb"] == first["score"]["val_bpb"]
    assert json.loads(out)["weights_sha256"] == first["weights_sha256"]


def test_another_final_of_the_same_training_trains_nothing(again, call):
    kept = again / "run/out/training/result.json"
    before = kept.stat().st_mtime_ns

    status, out, _ = call("-S", "final.average=swa", "-S", "final.quantize.bits.mlp=4")

    assert (status, json.loads(out)["entry"]) == (0, "swa")
    assert kept.stat().st_mtime_ns == before


def test_another_training_replaces_the_one_before(again, call):
    status, out, _ = call("-S", "train.iterations=6", "-S", "final.average=raw")

    trained = json.loads((again / "run/out/training/result.json").read_text(encoding="utf-8"))
    assert (status, trained["steps"], trained["steps_computed"]) == (0, 6, 6)
    assert json.loads(out)["entry"] == "raw"


def test_other_data_is_trained_on_anew(again, call):
    text = again / "other.txt"
    text.write_text(tiny.documents(seed=5), encoding="utf-8")
    shutil.rmtree(again / "data")
    prepare([text], again / "data", tiny.SETTINGS)
    kept = again / "run/out/training/result.json"
    before = kept.stat().st_mtime_ns

    status, _, _ = call()

    assert status == 0
    assert kept.stat().st_mtime_ns != before


def test_a_bad_recipe_is_one_line_and_exit_2(tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml")

    done = trainer_alone(recipe, "-S", "train.order=random", cwd=tmp_path)

    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f'{recipe}: train.order: got "random"; input should be ')
    assert list(tmp_path.iterdir()) == [recipe]


def test_a_missing_recipe_is_one_line_and_exit_2(again, call):
    (again / "run/recipe.yaml").unlink()

    status, out, lines = call()

    assert (status, out) == (2, "")
    assert lines == [f"{again}/run/recipe.yaml: No such file or directory"]


def test_a_diverged_training_is_one_line_and_exit_1(call):
    status, out, lines = call("-S", "train.optimizer.scalar.lr=1e30")

    assert (status, out) == (1, "")
    assert lines[-1].startswith("training diverged: loss ")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("data/tokenizer.model", "no such file"),
        ("data/tiny_val_000000.bin", "No such file"),
        ("data/manifest.json", "no such file"),
        ("run/out/training/bank/index.json", "no such file"),
        ("run/out/training/task.json", "no such file"),
    ],
)
def test_a_missing_file_is_one_line_with_its_name_and_exit_2(again, call, name, reason):
    path = next(again.glob(name.replace("tiny_val", "*_val")))
    path.unlink()

    status, out, lines = call()

    assert (status, out, len(lines)) == (2, "", 1)
    assert lines[0].startswith(f"{path}: {reason}")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("data/*_train_000000.bin", "truncated"),
        ("data/*_val_000000.bin", "truncated"),
        ("data/manifest.json", "not readable as JSON"),
        ("run/out/training/bank/ema-0.9.pt", "altered since it was written"),
        ("run/out/training/result.json", "not readable as JSON"),
        ("run/out/training/inputs.json", "not readable as JSON"),
    ],
)
def test_a_truncated_file_is_one_line_with_its_name_and_exit_2(again, call, name, reason):
    path = next(again.glob(name))
    path.write_bytes(path.read_bytes()[:-10])

    status, out, lines = call()

    assert (status, out, len(lines)) == (2, "", 1)
    assert lines[0].startswith(f"{path}: {reason}")


def score(again):
    artifact, dataset = again / "run/out/final/artifact", load_dataset(again / "data")
    spec = EvaluateSpec(window=32, stride=8)
    return score_artifact(artifact, dataset, spec, Ranks(), dtype="float32")


def test_the_artifact_on_disk_scores_as_was_reported(finished, again):
    reported = json.loads(finished[1].stdout)["score"]

    found = score(again)

    assert found.val_bpb == reported["val_bpb"]
    assert found.bytes == load_dataset(again / "data").num_bytes("val")


@pytest.mark.parametrize("position", [0, 30, -5])
def test_a_corrupted_artifact_is_refused_by_name(again, position):
    path = again / "run/out/final/artifact/weights.fw"
    content = bytearray(path.read_bytes())
    content[position] ^= 0x55
    path.write_bytes(content)

    with pytest.raises(DataError) as caught:
        score(again)

    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_an_artifact_is_not_scored_with_another_tokenizer(again):
    (again / "data/tokenizer.model").write_bytes(b"another")

    with pytest.raises(DataError, match=r"weights\.fw: made with another tokenizer"):
        score(again)


def test_the_code_that_is_counted_runs_in_a_clean_process(finished, tmp_path):
    shutil.copy(finished[0] / "out/final/artifact/code.pyz", tmp_path / "code.pyz")

    done = subprocess.run(
        [sys.executable, "code.pyz", "--help"], capture_output=True, text=True, cwd=tmp_path
    )

    assert done.returncode == 0, done.stderr
    assert "recipe" in done.stdout


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("train.qat={mlp_bits: 6, start: {lr_scale: 0.2}}", "train.qat.start never comes"),
        (
            "train.averages.swa={every: 7, start: {lr_scale: null, progress: 0.9}}",
            "train.averages.swa takes no",
        ),
    ],
)
def test_what_would_begin_after_the_end_is_refused_before_the_training(call, override, fault):
    status, out, lines = call("-S", override, "-S", "final.average=swa")

    assert (status, out, len(lines)) == (2, "", 1)
    assert fault in lines[0]
