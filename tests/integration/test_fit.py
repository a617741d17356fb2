"""`fairway quantize` and `fairway fit` on the bank of a small training."""

import json
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from service.cli import main
from tests import tiny
from trainer.codec import parse, read_mapping
from trainer.finalize.artifact import read_weights
from trainer.finalize.code import write_code
from trainer.finalize.pipeline import artifact_bytes
from trainer.run import load_training, train
from trainer.runtime.distributed import Ranks
from trainer.specs.final import FinalSpec
from trainer.specs.task import train_task

TRAINING = "5a0f00d5a0f00d5a0f00"
RECIPE = tiny.recipe(
    {
        "model.dim": 64,
        "model.attention.num_heads": 4,
        "train.iterations": 40,
        "observe.validate_every": 20,
    }
)


class Done(NamedTuple):
    """A command that ended."""

    status: int
    out: str
    err: str

    @property
    def data(self) -> dict[str, Any]:
        assert self.status == 0, self.err
        return json.loads(self.out)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home with the tiny data and one finished training on it."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "data").mkdir()
    dataset = tiny.dataset(folder / "data")
    train(train_task(RECIPE), dataset, folder / "store" / "trainings" / TRAINING, Ranks())
    return folder


@pytest.fixture(scope="module")
def fairway(home):
    """Call the command line in this process, on that home."""

    def call(*words: object) -> Done:
        out, err, status = StringIO(), StringIO(), 0
        argv = ["fairway", *map(str, words), "--home", str(home)]
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", argv)
            try:
                main()
            except SystemExit as done:
                status = int(done.code or 0)
        return Done(status, out.getvalue(), err.getvalue())

    return call


ZIP = ("-S", "final.code=zip")  # quick to make


@pytest.fixture(scope="module")
def code_bytes(tmp_path_factory):
    return write_code(tmp_path_factory.mktemp("code"), "zip").stat().st_size


@pytest.fixture(scope="module")
def fits(fairway, code_bytes, tmp_path_factory):
    """The raw weights fitted to three caps, and where they were copied to."""
    found = {}
    for weights_bytes in (25_000, 40_000, 60_000):
        cap, out = code_bytes + weights_bytes, tmp_path_factory.mktemp("fit") / "out"
        words = ("--cap", cap, "--entry", "raw", *ZIP, "--out", out)
        found[cap] = fairway("fit", TRAINING, *words, "-o", "json").data, out
    return found


def test_training_forecasts_the_bytes_of_its_weights_at_every_validation(home):
    curve = home / "store" / "trainings" / TRAINING / "metrics.jsonl"
    lines = [json.loads(line) for line in curve.read_text().splitlines()]

    sized = [line for line in lines if "size/forecast_bytes" in line]

    assert [line["step"] for line in sized] == [20, 40]
    for line in sized:
        low, high = line["size/forecast_low_bytes"], line["size/forecast_high_bytes"]
        assert 0 < low < line["size/forecast_bytes"] < high


def test_fit_lands_just_under_three_different_caps(fits):
    for cap, (document, out) in fits.items():
        assert document["artifact_bytes"] == artifact_bytes(out / "artifact")
        assert 0.995 * cap <= document["artifact_bytes"] <= cap
        assert document["headroom_bytes"] == cap - document["artifact_bytes"]
        assert document["choices"]["fills_cap"]


def test_more_bytes_cost_less_of_the_score(fits):
    scores = [document["val_bpb"] for document, _ in fits.values()]

    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[-1]


def test_score_of_a_fit_is_the_score_of_its_artifact(fits, fairway):
    document, out = next(iter(fits.values()))

    words = ("--data", "tiny", "--window", document["window"])
    again = fairway("score", out / "artifact", *words, "-o", "json").data

    assert again["val_bpb"] == document["val_bpb"]
    assert (again["tokens"], again["bytes"]) == (document["tokens"], document["bytes"])


def test_choices_are_told_and_make_the_same_artifact_again(fits, fairway, tmp_path):
    document, out = next(iter(fits.values()))
    choices = document["choices"]
    final = parse(FinalSpec, read_mapping(out / "final.yaml")["final"], "final.yaml")

    assert {name: getattr(final.quantize.bits, name) for name in choices["bits"]} == choices["bits"]
    assert choices["clips"].keys() == choices["bits"].keys() == {"embed", "attention", "mlp"}
    assert choices["coder"] == final.compress.kind
    assert choices["sensitivity"] in ("measured", "usual")
    assert len(choices["probed"]["plans"]) == 3
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(tiny.recipe_data() | read_mapping(out / "final.yaml")))
    words = (TRAINING, "--entry", "raw", "--recipe", recipe, "-o", tmp_path / "again")
    again = fairway("quantize", *words, "--output", "json").data
    assert again["weights_sha256"] == document["weights_sha256"]


def test_forecast_of_a_fit_is_told_with_its_interval(fits):
    for document, _ in fits.values():
        forecast = document["forecast_weights_bytes"]
        assert forecast["low"] < forecast["point"] < forecast["high"]
        assert forecast["point"] == pytest.approx(document["weights_bytes"], rel=0.35)


def test_fit_that_is_there_is_found_again(fits, fairway):
    cap = next(iter(fits))

    again = fairway("fit", TRAINING, "--cap", cap, "--entry", "raw", *ZIP, "-o", "json")

    assert "found" in again.err
    assert "written" not in again.err
    assert again.data["val_bpb"] == fits[cap][0]["val_bpb"]


def test_what_the_user_sets_stays(fairway, code_bytes):
    words = (
        "-S", "final.compress.kind=zlib", "-S", "final.prune.ratio=0.2",
        "-S", "final.prune.larger_than=0", "-S", "final.quantize.float_numel=2048", *ZIP,
    )  # fmt: skip
    document = fairway(
        "fit", TRAINING, "--cap", code_bytes + 30_000, "--entry", "raw", *words, "-o", "json"
    ).data

    choices = document["choices"]
    assert (choices["coder"], choices["prune"], choices["code"]) == ("zlib", 0.2, "zip")
    assert choices["coder_bytes"] == {}
    assert choices["code_bytes"].keys() == {"zip"}
    assert choices["fills_cap"]


def test_impossible_cap_exits_with_3_and_the_smallest_size_reached(fairway, code_bytes, home):
    cap = code_bytes + 1_000
    done = fairway("fit", TRAINING, "--cap", cap, "--entry", "raw", *ZIP)

    assert done.status == 3
    line = done.err.splitlines()[-1]
    found = re.fullmatch(
        rf"a cap of {cap:,} bytes: no artifact is so small; the smallest reached has ([\d,]+) "
        "bytes; allow as many or train a smaller model",
        line,
    )
    assert found is not None, line
    smallest = int(found[1].replace(",", ""))
    assert cap < smallest < cap + 4_000
    assert not list((home / "fits").glob(".*"))


def test_model_too_small_for_the_cap_is_written_at_its_best_and_says_so(fairway):
    document = fairway("fit", TRAINING, "--cap", 16_000_000, "--entry", "raw", "-o", "json").data

    assert document["choices"]["fills_cap"] is False
    assert document["choices"]["code"] == "packed"
    assert document["code_bytes"] == document["choices"]["code_bytes"]["packed"]
    assert document["choices"]["reason"] == "the finest grids of all tensors take no more"
    assert set(document["choices"]["bits"].values()) == {16}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("nothing", "--cap", 10**6), "nothing: no folder of an import, and 0 trainings"),
        ((TRAINING, "--cap", 10**6), r"say which entry of the bank: --entry raw | ema-"),
        ((TRAINING, "--cap", 10**6, "--entry", "best"), "say which entry of the bank: --entry raw"),
        (
            (TRAINING, "--cap", 10**6, "--entry", "raw", "-S", "final.quantize.bits.mlp=4"),
            "-S final.quantize.bits.mlp: fit chooses it",
        ),
        (
            (TRAINING, "--cap", 10**6, "--entry", "raw", "-S", "model.dim=4"),
            "-S model.dim: a bank is trained already; set values of final",
        ),
        (
            (TRAINING, "--cap", 10**6, "--entry", "raw", "--data", "other"),
            "prepare that data there, or name it: --data",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_2(fairway, words, line):
    done = fairway("fit", *words)

    assert done.status == 2
    assert line in done.err
    assert len(done.err.splitlines()) == 1


def test_text_to_choose_by_may_not_be_the_text_that_is_scored(fairway, home):
    (shard,) = (home / "data" / "tiny").glob("*val*")
    tokenizer = home / "data" / "tiny" / "tokenizer.model"

    words = ("--train-tokens", shard, "--tokens", shard, "--tokenizer", tokenizer)
    done = fairway("fit", TRAINING, "--cap", 10**6, "--entry", "raw", *words)

    assert done.status == 2
    assert "what is scored must be unseen" in done.err


def test_quantize_writes_an_artifact_and_a_line_for_every_tensor(fairway, home, tmp_path):
    out = tmp_path / "out"
    words = ("-S", "final.quantize.clip=sd12", "-S", "final.quantize.float_numel=256")
    done = fairway("quantize", TRAINING, "--entry", "raw", *words, "-o", out)

    assert done.status == 0, done.err
    task, _ = load_training(home / "store" / "trainings" / TRAINING)
    model, tensors, _ = read_weights(out / "artifact" / "weights.fw")
    assert model == task.model
    lines = done.out.splitlines()
    assert lines[0].split() == [
        "tensor", "bits", "method", "bytes", "share", "mse", "hessian", "error", "damping",
        "seconds",
    ]  # fmt: skip
    named = {line.split()[0]: line.split() for line in lines[1 : len(tensors) + 1]}
    assert named.keys() == tensors.keys()
    assert named["blocks.0.mlp.up.weight"][1:3] == ["6", "nearest"]
    assert lines[len(tensors) + 1].startswith("header and rest")
    records = json.loads((out / "tensors.json").read_text())
    assert (
        sum(record["bytes"] for record in records)
        < (out / "artifact" / "weights.fw").stat().st_size
    )


def test_quantize_rounds_by_hessians_of_training_text(fairway, tmp_path):
    words = ("-S", "final.quantize.gptq={sequences: 8, seq_len: 32}", "--output", "json")
    words += ("-S", "final.quantize.float_numel=256", "-S", "final.quantize.clip=sd12")
    document = fairway("quantize", TRAINING, "--entry", "raw", *words, "-o", tmp_path / "o").data

    rounded = [record for record in document["tensors"] if record["method"] == "gptq"]
    assert len(rounded) >= 12
    assert all(r["hessian_error"] <= r["nearest_hessian_error"] for r in rounded)


def test_hessians_of_a_training_are_collected_once_for_quantize_and_fit(
    fairway, home, tmp_path, code_bytes
):
    gptq = ("-S", "final.quantize.gptq={sequences: 6, seq_len: 32}", "--entry", "raw")

    fairway("quantize", TRAINING, *gptq, "-S", "final.quantize.clip=p3", "-o", tmp_path / "a")
    (first,) = collected_from(home, sequences=6)
    fairway("quantize", TRAINING, *gptq, "-S", "final.quantize.clip=p5", "-o", tmp_path / "b")
    fairway("fit", TRAINING, "--cap", code_bytes + 50_000, *gptq, *ZIP)

    assert collected_from(home, sequences=6) == [first]


def collected_from(home, sequences):
    """When each collection of Hessians from so many sequences of 32 tokens was written."""
    results = [path for path in (home / "store" / "hessians").glob("*/result.json")]
    return [
        (path, path.stat().st_mtime_ns)
        for path in results
        if json.loads(path.read_text())["tokens"] == 32 * sequences
    ]


def test_folder_that_holds_something_is_refused_before_any_work(fairway, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")

    for words in (("quantize", TRAINING, "-o"), ("fit", TRAINING, "--cap", 10**6, "--out")):
        done = fairway(*words, tmp_path)
        assert (done.status, done.out) == (2, "")
        assert done.err == f"{tmp_path}: holds something already; name a new folder with --out\n"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_default_settings_are_those_of_a_recipe_where_one_is_named(fairway, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    data = tiny.recipe_data({"final.average": "ema", "final.quantize.clip": "p5"})
    recipe.write_text(json.dumps(data))

    words = ("--recipe", recipe, "-o", tmp_path / "out", "--output", "json")
    document = fairway("quantize", TRAINING, *words).data

    assert document["entry"] == "ema-0.9"
    final = read_mapping(Path(document["artifact"]).parent / "final.yaml")["final"]
    assert final["quantize"]["clip"] == "p5"
