"""A trial whose process dies just when Tune hands it the next trial: Tune gives that one up."""

import io
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from rich.console import Console

from service.cluster import Where
from service.control import Orders
from service.identity import inputs_of
from service.launch import Launcher, Site
from service.ledger import Ledger
from service.paths import Paths
from service.plan import make_plan
from service.recorder import Recorder
from service.sources import Planned
from service.states import State
from service.store import Store
from service.sweep import load_sweep
from service.talk import Talk
from service.trials import Work
from trainer.data.shards import Dataset

pytestmark = pytest.mark.timeout(1200)
SWEEP = """\
name: dying
recipe: tiny
space:
  train.averages.ema_decay: {values: [0.8, 0.9]}
  final.quantize.clip: {values: [none, p5]}
seeds: {search: [7]}
resources: {workers: 1}
limits: {infra_retries: 2}
"""


def dying_final(died: Path) -> Callable[[dict[str, Any]], None]:
    """Work that reports an outcome; the first time that anybody does, the process ends after it."""

    # Not at module level: what Ray's processes cannot import, they are handed whole.
    def final(config: dict[str, Any]) -> None:
        if not died.exists():
            died.touch()
            threading.Thread(target=lambda: (time.sleep(0.02), os._exit(1)), daemon=True).start()
        outcome = {"final": config["stage"], "kind": "final", "cached": False, "result": None}
        ended = {"infeasible": "too large", "occupied_s": 0.0}
        tune.report({"outcome": json.dumps(outcome | ended), "val_bpb": 1.0})

    return final


def test_a_trial_lost_between_two_trials_is_started_again(tiny_dataset: Dataset, tmp_path: Path):
    file = tmp_path / "sweep.yaml"
    file.write_text(SWEEP)
    sweep, paths, talk = load_sweep(file), Paths(tmp_path), Talk(Console(file=io.StringIO()))
    plan = make_plan(sweep, inputs_of(tiny_dataset), str(file))
    folder = paths.sweep(plan.sweep_id)
    died = tmp_path / "died"
    orders = Orders(folder.control, time.time())
    site = Site(paths, tiny_dataset, Where(None, 1), Work(final=dying_final(died)))
    with Ledger(folder.ledger) as ledger:
        ledger.append("sweep_started", sweep_id=plan.sweep_id)
        recorder = Recorder(ledger, Store(paths.store), talk, sweep.constraints, sweep.clocks)
        with Launcher(sweep, plan, site, recorder, talk, orders) as launcher:
            launcher.finalize("final", Planned(plan.finals))
        ended = Counter(final["state"] for final in recorder.view.finals.values())

    assert died.exists()
    assert ended == {State.INFEASIBLE: plan.num_finals}
