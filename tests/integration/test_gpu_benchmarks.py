"""The GPU benchmarks as commands, on a CPU: the walk through them, not the figures."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--device", "cpu", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_every_part_is_measured_in_both_columns_and_the_substitute_is_named(tmp_path: Path) -> None:
    done = run("gpu.py", "--recipe", "pr414-tiny", "--out", str(tmp_path))

    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert "failed" not in found
    assert found["limits"].keys() == {"flop_per_s", "bytes_per_s"}
    assert found["attention"]["torch"]["backward_ms"] > 0
    assert "CUDA device" in found["attention"]["flash_attn_4"]["missing"]
    for column in ("plain", "fast"):
        assert found[column].keys() >= {"step_ms", "update_ms", "loader_ms", "evaluation_s"}
        assert 0 < found[column]["update_ms"] < found[column]["step_ms"]
    assert found["fast"].keys() >= {"hessians_s", "final_gptq_s", "final_write_s"}
    assert found["elsewhere"] == {}  # of another machine
    lines = done.stdout.splitlines()
    assert any(line.startswith("training step, ms") for line in lines)
    assert any(line.startswith("* torch, for flash_attn_4: ") for line in lines)


def test_a_part_that_fails_is_named_and_costs_no_other(tmp_path: Path) -> None:
    words = ("--recipe", "pr414-tiny", "--columns", "plain", "--parts", "limits,step,eval")
    done = run("gpu.py", *words, "--out", str(tmp_path), "-S", "train.micro_batch_tokens=384")

    assert done.returncode == 1
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert "train.micro_batch_tokens=384 does not divide" in found["failed"]["step, plain"]
    assert "FAILED step, plain: " in done.stdout
    assert found["plain"]["evaluation_s"] > 0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.dataset(tmp_path_factory.mktemp("data")).folder


def test_pairs_of_trainings_are_compared_and_a_second_call_runs_only_what_is_missing(
    data: Path, tmp_path: Path
) -> None:
    words = ["--recipe", "pr414-tiny", "--data", str(data), "--out", str(tmp_path), "--steps", "4"]
    words += ["-S", "train.optimizer.matrix.momentum_warmup_steps=2"]
    one = run("kernel_noise.py", *words, "--seeds", "1")
    kept = (tmp_path / "sequential-1-plain" / "result.json").stat().st_mtime_ns

    two = run("kernel_noise.py", *words, "--seeds", "1,2")

    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert "give a second seed" in one.stdout
    assert (tmp_path / "sequential-1-plain" / "result.json").stat().st_mtime_ns == kept
    found = json.loads((tmp_path / "noise.json").read_text(encoding="utf-8"))
    assert [(row["seed"], row["column"]) for row in found["rows"]] == [
        (1, "fast"), (1, "plain"), (2, "fast"), (2, "plain")
    ]  # fmt: skip
    assert found["verdicts"]["val_bpb"]["seed_deviation"] > 0
    # On a CPU the fast kernels are the plain ones.
    assert found["verdicts"]["val_bpb"]["mean"] == pytest.approx(0.0, abs=1e-4)
    assert "within seed noise" in two.stdout


def test_no_training_is_begun_once_the_seconds_are_over(data: Path, tmp_path: Path) -> None:
    words = ["--recipe", "pr414-tiny", "--data", str(data), "--out", str(tmp_path)]

    done = run("kernel_noise.py", *words, "--seeds", "1", "--for-s", "-1")

    assert done.returncode == 0, done.stderr
    assert "2 trainings are still to be run" in done.stdout
    assert not list(tmp_path.glob("*/result.json"))
