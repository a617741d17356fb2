"""A training that does not fit says what it peaked at and what to lower."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from trainer.codec import dump
from trainer.errors import OutOfMemory, TrainingError
from trainer.run import train
from trainer.runtime.distributed import Ranks
from trainer.specs.task import train_task

ROOT = Path(__file__).resolve().parents[2]
LIMITED = """
import resource, runpy, sys
import torch, trainer.run
size_bytes = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size_bytes + 400_000_000,) * 2)
sys.argv = ["gang_jobs", sys.argv[1]]
runpy.run_module("tests.gang_jobs", run_name="__main__")
"""


def test_a_step_that_does_not_fit_names_its_peak_and_the_knob(tiny_dataset, tmp_path):
    # 128 MiB of losses' inputs and more: beyond what the process may take.
    task = train_task(
        tiny.recipe({"train.batch_tokens": 131072, "train.micro_batch_tokens": 131072})
    )
    path = tmp_path / "jobs.json"
    job = {"task": dump(task), "folder": str(tmp_path / "out")}
    path.write_text(json.dumps({"data": str(tiny_dataset.folder), "jobs": [job]}))

    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)], cwd=ROOT, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    (said,) = json.loads((tmp_path / "jobs.json.0").read_text())
    assert re.match(r"OutOfMemory: rank 0 ran out of memory \(peak \d\.\d+ GiB", said)
    assert "can't allocate memory" in said
    assert said.endswith("lower train.micro_batch_tokens, now 131072")


def test_a_batch_that_no_machine_holds_is_out_of_memory_too(tiny_dataset, tmp_path):
    task = train_task(tiny.recipe({"train.batch_tokens": 2**50}))

    with pytest.raises(OutOfMemory, match=r"GiB of the process\): Unable to allocate .* PiB"):
        train(task, tiny_dataset, tmp_path, Ranks())
    assert issubclass(OutOfMemory, TrainingError)
