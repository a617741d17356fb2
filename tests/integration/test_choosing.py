"""Finals chosen on held-out training text: ranked, fitted to a cap, and what makes them fail."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.tasks import run_final, run_fit, run_rank
from tests import tiny
from trainer.codec import dump
from trainer.data.shards import load_dataset, open_shard, write_shard
from trainer.errors import DataError, TrainingError
from trainer.finalize.pipeline import artifact_bytes
from trainer.run import train
from trainer.runtime.distributed import Ranks
from trainer.runtime.files import read_json, write_json
from trainer.runtime.tensors import load_tensors, save_tensors
from trainer.scoring import Text, load_artifact, score_state
from trainer.specs.task import final_task, fit_task, train_task

ROOT = Path(__file__).resolve().parents[2]
SGD = {"kind": "sgd", "chunk_tokens": 64}
KNOWN = ("ranks/r0", "finals/b0")  # computed once, for every test
EVERY = pytest.mark.parametrize("run", [run_final, run_rank, run_fit])

# A host that has little more memory than importing takes.
SHORT_OF_MEMORY = """\
import json, resource, sys
from pathlib import Path
from service import tasks
from trainer.errors import TrainingError

job = json.loads(sys.argv[1])
tasks.run_rank({**job, "rank": "warm"})  # whatever is loaded late is loaded by now
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 64 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
job["task"]["evaluate"] |= {"stride": 1, "batch_windows": 1_000_000}
try:
    tasks.run_rank(job)
except TrainingError as error:
    sys.exit(str(error))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with data and one finished training, whose bank has passed its parity check."""
    home = tmp_path_factory.mktemp("choosing")
    dataset = tiny.dataset(home)
    recipe = tiny.recipe({"train.iterations": 5})
    train(train_task(recipe), dataset, home / "store/trainings/t0", Ranks())
    cap = run_rank(job(home, rank="r0"))["result"]["artifact_bytes"] - 8_000
    run_fit(job(home, cap_bytes=cap, fit="b0"))
    return home


@pytest.fixture
def home(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "home"))


def job(home: Path, values: dict[str, Any] | None = None, **ids: Any) -> dict[str, Any]:
    """What a worker is told. Its artifact's id follows from the values of its final."""
    recipe = tiny.recipe({"final.quantize.float_numel": 64, **(values or {})})
    task = final_task(recipe)
    made = json.dumps([dump(task.final), task.entry])
    return {
        "store": str(home / "store"),
        "data": str(home / "tiny"),
        "training": "t0",
        "artifact": f"a{np.frombuffer(made.encode(), np.uint8).sum()}",
        "hessians": "h0",
        "task": dump(task),
        "cpus": 1,
        "device": "cpu",
        "final": "f",
        "rank": "r",
        "fit": "b",
        "cap_bytes": 10**9,
        **ids,
    }


def cap(home: Path) -> int:
    """A cap that the final of an ordinary job is over by far."""
    return read_json(home / "store/ranks/r0/result.json")["artifact_bytes"] - 8_000


def results(home: Path, kind: str) -> list[Path]:
    return sorted((home / "store" / kind).glob("*/result.json"))


def scramble_validation(home: Path) -> None:
    """Make every validation token another one."""
    (shard,) = load_dataset(home / "tiny").manifest.splits["val"].shards
    path = home / "tiny" / shard.file
    write_shard(path, np.asarray(open_shard(path))[::-1].copy())


@pytest.mark.parametrize("values", [{}, {"evaluate.ttt": SGD}])
def test_a_rank_is_the_score_of_the_artifact_on_the_held_out_shards(
    home: Path, values: dict[str, Any]
) -> None:
    asked = job(home, values)
    ranked = run_rank(asked)["result"]

    dataset = load_dataset(home / "tiny")
    stream = dataset.stream("holdout")
    text = Text(stream.read(0, len(stream)), dataset.tokenizer_path, "held out")
    artifact = home / "store/artifacts" / asked["artifact"] / "artifact"
    model, state = load_artifact(artifact, dataset.tokenizer_path)
    spec = tiny.recipe(values).evaluate
    own = score_state(model, state, text, spec, Ranks(), dtype="float32").score
    assert ranked["holdout_bpb"] == own.val_bpb
    assert (ranked["tokens"], ranked["bytes"]) == (len(stream) - 1, dataset.num_bytes("holdout"))
    assert ranked["artifact_bytes"] == artifact_bytes(artifact)
    assert not [name for name in ranked if name.startswith("val")]


def test_a_rank_and_a_fit_read_no_validation_text(home: Path, trained: Path) -> None:
    ranked, fitted = (read_json(trained / "store" / name / "result.json") for name in KNOWN)
    for kind in ("ranks", "fits", "finals"):
        shutil.rmtree(home / "store" / kind)

    scramble_validation(home)

    assert run_rank(job(home))["result"]["holdout_bpb"] == ranked["holdout_bpb"]
    blind = run_fit(job(home, cap_bytes=cap(trained)))["result"]
    assert blind["weights_sha256"] == fitted["weights_sha256"]
    assert blind["score"]["val_bpb"] != fitted["score"]["val_bpb"]


def test_a_rank_leaves_its_artifact_to_the_final_and_is_found_again(home: Path) -> None:
    ranked = run_rank(job(home))
    made = {path: path.stat().st_mtime_ns for path in results(home, "artifacts")}

    scored = run_final(job(home))["result"]

    assert scored["weights_sha256"] == ranked["result"]["weights_sha256"]
    assert {path: path.stat().st_mtime_ns for path in results(home, "artifacts")} == made
    assert (ranked["cached"], run_rank(job(home))) == (False, {**ranked, "cached": True})


def test_a_fit_is_a_final_under_the_cap_whose_clips_and_bits_were_chosen(home: Path) -> None:
    found = run_fit(job(home, cap_bytes=cap(home), fit="b0"))

    result, folder = found["result"], home / "store/finals/b0"
    assert found["cached"]
    assert result["artifact_bytes"] == artifact_bytes(folder / "artifact")
    assert 0.99 * cap(home) < result["artifact_bytes"] <= cap(home)
    assert {rule["id"] for rule in result["audit"]} >= {"coverage", "parity", "clocks"}
    asked, chosen = job(home)["task"]["final"], read_json(folder / "task.json")["final"]
    assert chosen["quantize"] != asked["quantize"]
    assert [chosen.get(name) for name in ("prune", "compress", "code")] == [
        asked.get(name) for name in ("prune", "compress", "code")
    ]
    made = run_final(job(home, {"final": chosen}, artifact="again"))["result"]
    assert made["weights_sha256"] == result["weights_sha256"]


def test_fits_that_differ_in_their_evaluation_share_the_artifact(home: Path) -> None:
    first = read_json(home / "store/finals/b0/result.json")

    second = run_fit(job(home, {"evaluate.stride": 4}, cap_bytes=cap(home)))["result"]

    assert len(results(home, "fits")) == 1
    assert first["weights_sha256"] == second["weights_sha256"]
    assert first["score"]["val_bpb"] != second["score"]["val_bpb"]


def test_a_cap_out_of_reach_is_infeasible_with_the_smallest_size_and_is_remembered(
    home: Path,
) -> None:
    found = run_fit(job(home, cap_bytes=100_000))

    assert list(found) == ["infeasible"]
    assert found["infeasible"].startswith("a cap of 100,000 bytes: no artifact is so small; the ")
    written = {path: path.stat().st_mtime_ns for path in results(home, "fits")}
    assert run_fit(job(home, cap_bytes=100_000)) == found
    assert {path: path.stat().st_mtime_ns for path in results(home, "fits")} == written
    assert not (home / "store/finals/b").exists()


def test_points_that_differ_in_what_a_fit_chooses_share_it() -> None:
    gptq = {"row_importance": 0.5}
    points: list[dict[str, Any]] = [
        {"final.quantize.clip": "sd12", "final.quantize.gptq": gptq},
        {"final.quantize.clip": "sd9", "final.quantize.gptq": gptq, "final.quantize.bits.mlp": 4},
    ]
    first, second = (fit_task(final_task(tiny.recipe(point))) for point in points)
    other = fit_task(final_task(tiny.recipe({**points[0], "final.prune.ratio": 0.1})))

    assert first == second
    assert first != other


@EVERY
def test_a_bank_that_fails_its_parity_check_is_quarantined(home: Path, run: Any) -> None:
    shutil.rmtree(home / "store/parities")
    path = home / "store/trainings/t0/result.json"
    write_json(path, {**read_json(path), "parity_bpb": 1.0})

    found = run(job(home))

    assert list(found) == ["quarantined"]
    assert "parity check: trainer 1.0" in found["quarantined"]


def test_weights_that_are_no_numbers_fail_the_final_before_anything_is_recorded(home: Path) -> None:
    shutil.rmtree(home / "store/parities")
    bank = home / "store/trainings/t0/bank"
    entries = {path.stem: load_tensors(bank, path.stem) for path in bank.glob("*.pt")}
    for tensors in entries.values():
        next(iter(tensors.values())).fill_(float("nan"))
    shutil.rmtree(bank)
    save_tensors(bank, entries)

    with pytest.raises(TrainingError, match="are no numbers; check the model's weights"):
        run_final(job(home))

    assert not results(home, "parities")


@pytest.mark.parametrize("run", [run_final, run_rank])
def test_test_time_training_that_diverges_fails_with_what_to_lower(home: Path, run: Any) -> None:
    values = {"evaluate.ttt": {**SGD, "lr": 1e38, "clip_norm": 1e38}}

    with pytest.raises(TrainingError, match=r"lower evaluate\.ttt\.lr"):
        run(job(home, values))

    assert not (home / "store/finals/f/result.json").exists()
    assert not (home / "store/ranks/r/result.json").exists()


def test_a_final_that_runs_out_of_memory_says_so_and_what_to_lower(home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY, json.dumps(job(home))],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    line = done.stderr.splitlines()[-1]
    assert line.startswith("out of memory: "), done.stderr
    assert "; lower evaluate.batch_windows" in line
    assert not (home / "store/ranks/r/result.json").exists()


@pytest.mark.parametrize(
    ("calibration", "counted"), [("train", "train 500."), ("generated", "train 0.")]
)
def test_only_calibration_on_training_text_counts_on_the_training_clock(
    home: Path, calibration: str, counted: str
) -> None:
    gptq = {"sequences": 4, "seq_len": 32, "calibration": calibration}
    values = {"final.quantize.gptq": gptq}
    run_rank(job(home, values))
    path = home / "store/hessians/h0/result.json"
    write_json(path, {**read_json(path), "clock_s": 500.0})  # as if it had taken so long
    shutil.rmtree(home / "store/artifacts")

    result = run_final(job(home, values))["result"]

    clocks = next(rule for rule in result["audit"] if rule["id"] == "clocks")
    assert clocks["detail"].startswith(counted)
    assert (result["calibration"], result["calibration_clock_s"]) == (calibration, 500.0)


def test_an_artifact_that_was_altered_is_not_ranked(home: Path) -> None:
    asked = job(home)
    run_final(asked)
    weights = home / "store/artifacts" / asked["artifact"] / "artifact/weights.fw"
    weights.write_bytes(weights.read_bytes() + b"x")

    with pytest.raises(DataError, match="altered since it was written"):
        run_rank(asked)
