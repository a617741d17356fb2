"""The stages of a final: shared where they can be, and none computed twice, whenever one dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from service.tasks import run_final
from tests import tiny
from trainer.artifacts import Entry, open_entry
from trainer.codec import dump, parse
from trainer.data.shards import load_dataset
from trainer.errors import DataError
from trainer.finalize.hessians import load_hessians, save_hessians
from trainer.run import train
from trainer.runtime.distributed import Ranks
from trainer.runtime.tensors import load_tensors, save_tensors
from trainer.specs.task import FinalTask, artifact_task, final_task, train_task

ROOT = Path(__file__).resolve().parents[2]
GPTQ = {"sequences": 4, "seq_len": 32}
SMALL = {"final.quantize.float_numel": 64, "final.quantize.gptq": GPTQ}

# A process that dies as soon as the function of a stage is done, or is in the middle of it.
DIE = """\
import json, os, signal, sys
from service import tasks
from trainer.evaluate.tape import Tape
from trainer.runtime import files

owner, name, after = sys.argv[2:]
owner = {"tasks": tasks, "Tape": Tape}[owner]
real, left = getattr(owner, name), int(after)

def last(*args, **kwargs):
    global left
    result = real(*args, **kwargs)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(owner, name, last)
tasks.run_final(json.loads(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with data and one finished training."""
    home = tmp_path_factory.mktemp("stages")
    dataset = tiny.dataset(home)
    recipe = tiny.recipe({"train.iterations": 5})
    train(train_task(recipe), dataset, home / "store/trainings/t0", Ranks())
    return home


@pytest.fixture
def home(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "home"))


def job(home: Path, final: str = "f0", stride: int = 8) -> dict[str, Any]:
    """What a final's worker is told."""
    task = final_task(tiny.recipe({**SMALL, "evaluate.stride": stride}))
    return {
        "store": str(home / "store"),
        "data": str(next(home.glob("**/manifest.json")).parent),
        "training": "t0",
        "final": final,
        "artifact": "a0",
        "hessians": "h0",
        "task": dump(task),
        "cpus": 1,
        "device": "cpu",
    }


def results(home: Path) -> dict[str, tuple[int, int]]:
    """Each finished stage's result by inode and time: another one was written anew."""
    found = (home / "store").glob("*/*/result.json")
    return {
        str(path.relative_to(home)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found
    }


def written(home: Path) -> bytes:
    return (home / "store/finals/f0/artifact/weights.fw").read_bytes()


def test_finals_that_differ_in_their_evaluation_share_artifact_and_hessians(home: Path) -> None:
    first = run_final(job(home))["result"]
    before = results(home)

    second = run_final(job(home, "f1", stride=4))["result"]

    assert {name: results(home)[name] for name in before} == before
    assert sorted(set(results(home)) - set(before)) == ["store/finals/f1/result.json"]
    assert second["weights_sha256"] == first["weights_sha256"]
    assert second["score"]["val_bpb"] != first["score"]["val_bpb"]


def test_finals_in_one_process_share_the_bank_until_its_file_changes(home: Path) -> None:
    told = job(home)
    run_final(told)
    store, task = home / "store", artifact_task(parse(FinalTask, told["task"], "task"))
    dataset = load_dataset(Path(told["data"]))

    def opened() -> Entry:
        return open_entry(task, store / "trainings/t0", dataset, store / "hessians/h0", Ranks())

    one, two = opened(), opened()

    assert one.hessians is not None
    assert two.hessians is not None
    for first, second in ((one.state, two.state), (one.hessians, two.hessians)):
        assert all(second[name] is tensor for name, tensor in first.items())
    bank, hessians = store / "trainings/t0/bank", store / "hessians/h0"
    as_written = load_tensors(bank, task.entry), load_hessians(hessians, torch.device("cpu"))
    run_final(job(home, "f1") | {"artifact": "a1"})
    assert_same(opened(), *as_written)
    save_tensors(bank, {task.entry: _doubled(as_written[0])})
    save_hessians(hessians, _doubled(as_written[1]))
    assert_same(opened(), *map(_doubled, as_written))
    file = store / f"trainings/t0/bank/{task.entry}.pt"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{task.entry}.pt: altered"):
        opened()


def assert_same(entry: Entry, state: dict[str, Tensor], hessians: dict[str, Tensor]) -> None:
    assert entry.hessians is not None
    torch.testing.assert_close(dict(entry.state), state, rtol=0, atol=0)
    torch.testing.assert_close(dict(entry.hessians), hessians, rtol=0, atol=0)


def _doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: 2 * tensor for name, tensor in tensors.items()}


def test_the_seconds_that_calibration_reads_training_text_are_recorded(home: Path) -> None:
    result = run_final(job(home))["result"]

    clocks = next(rule for rule in result["audit"] if rule["id"] == "clocks")
    assert result["calibration_clock_s"] > 0
    assert clocks["verdict"] == "not checked"


@pytest.mark.parametrize(
    ("owner", "name", "after", "done"),
    [
        ("tasks", "check_parity", 1, ["parities"]),
        ("tasks", "collect", 1, ["parities", "hessians"]),
        ("tasks", "make_artifact", 1, ["parities", "hessians", "artifacts"]),
        # 4 batches end the parity check; this is in the middle of the final's own.
        ("Tape", "land", 6, ["parities", "hessians", "artifacts"]),
    ],
)
def test_a_final_that_is_killed_goes_on_with_the_same_bytes(
    home: Path, tmp_path: Path, owner: str, name: str, after: int, done: list[str]
) -> None:
    straight = Path(shutil.copytree(home, tmp_path / "straight"))
    wanted = run_final(job(straight))["result"]

    killed = subprocess.run(
        [sys.executable, "-c", DIE, json.dumps(job(home)), owner, name, str(after)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )

    assert killed.returncode == -signal.SIGKILL
    finished = results(home)
    stages = {Path(path).parts[1] for path in finished} - {"trainings"}
    assert sorted(stages) == sorted(done)
    found = run_final(job(home))
    assert not found["cached"]
    assert {path: results(home)[path] for path in finished} == finished
    assert written(home) == written(straight)
    assert found["result"]["score"]["val_bpb"] == wanted["score"]["val_bpb"]
