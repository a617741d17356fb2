"""Real sweeps for the integration tests: a micro model, a local Ray, gangs of two."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SWEEP = """\
version: 1
name: micro
recipe: tiny
overrides:
  model: {num_layers: 2, dim: 32, attention: {num_heads: 2, num_kv_heads: 1, rope: {dims: 8}}}
  train: {iterations: 160, batch_tokens: 1024, seq_len: 128}
  final.quantize.float_numel: 256
  evaluate: {window: 128, stride: 64, batch_windows: 32}
  observe: {log_every: 5, validate_every: 30, checkpoint_every: 5}
space:
  train.schedule.warmdown_iters: {phase: train, values: [10, 20]}
  train.averages.ema_decay:      {phase: bank,  values: [0.8, 0.9]}
  final.quantize.clip:           {phase: final, values: [none, p5]}
constraints: [artifact_bytes <= 1_000_000, audit == pass]
seeds: {search: [7]}
resources: {workers: 2, start_timeout_s: 300}
limits: {max_concurrent: 1}
"""
NUM_TRAININGS, NUM_FINALS, NUM_STEPS = 2, 8, 160
TRUNK_STEPS, TAIL_STEPS = 150, (10, 20)  # the warmdowns are the tails


@dataclass(frozen=True)
class Cli:
    """The real command line, in a process of its own, on one home."""

    home: Path
    sweep: Path

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "service", *words, "--home", str(self.home)]

    def __call__(self, *words: str, timeout_s: float = 900) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=self.environment(),
        )

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        with (self.home / "run.log").open("ab") as log:
            return subprocess.Popen(
                self.command(*words), stdout=log, stderr=log, env=self.environment()
            )

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        return self("run", str(self.sweep), *options)

    def json(self, *words: str) -> Any:
        done = self(*words, "-o", "json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    @staticmethod
    def environment() -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}


def make_cli(root: Path, text: str = SWEEP) -> Cli:
    root.mkdir(parents=True, exist_ok=True)
    sweep = root / "sweep.yaml"
    sweep.write_text(text)
    return Cli(root / "home", sweep)


def events(home: Path, name: str = "micro") -> list[dict[str, Any]]:
    """All events of the one sweep of that name in a home, as a reader sees them."""
    from service.ledger import read

    (ledger,) = home.glob(f"sweeps/{name}-*/events.jsonl")
    return list(read(ledger))


def by_point(home: Path, keys: Sequence[str], name: str = "micro") -> dict[str, Any]:
    """Results of the finals by point, without what a clock says."""
    finals = {}
    for event in events(home, name):
        if event["event"] == "final_scored":
            result = event["result"]
            facts = {key: result[key] for key in keys} | {"bpb": result["score"]["val_bpb"]}
            finals[json.dumps(event["point"], sort_keys=True)] = facts
    return finals


@dataclass(frozen=True)
class Finished:
    """A finished sweep, and what its run printed."""

    cli: Cli
    done: subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The micro sweep, run once and undisturbed, for every test that looks at one."""
    cli = make_cli(tmp_path_factory.mktemp("sweep"))
    done = cli.run()
    assert done.returncode == 0, done.stdout + done.stderr
    return Finished(cli, done)
