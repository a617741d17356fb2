"""Stands in for `fairway run` where the service as a whole is tested: a submission's real plan,
its real ids and a real ledger, but nothing trained. A stage takes `limits.infra_retries` tenths of
a second: a field that enters no identity. A sweep named NAME finishes nothing as long as there is
a file HOME/hold-NAME.

Every start leaves a line "SWEEP_ID ATTEMPT" in HOME/starts.txt.
"""

import sys
import time
from pathlib import Path
from typing import Any

from service.catalogue_view import data_of
from service.control import Orders
from service.identity import inputs_of
from service.ledger import RETRIED, Ledger
from service.paths import Paths
from service.plan import Plan, make_plan
from service.sweep import Sweep, load_sweep
from tests.ledgers import final_result, train_result
from tune_spaces.space import phase_of


class Told(Exception):
    """It has been told to end: as what, and why."""


def main() -> int:
    """Do what `fairway run sweep.yaml --home H --no-tracking -S …` is asked to do."""
    words = sys.argv[1:]
    paths = Paths(Path(words[words.index("--home") + 1]))
    sweep = load_sweep(
        Path(words[0]), [words[i + 1] for i, word in enumerate(words) if word == "-S"]
    )
    plan = make_plan(sweep, inputs_of(data_of(paths, sweep.data)), words[0])
    folder = paths.sweep(plan.sweep_id)
    attempt = max(int(path.stem) for path in folder.jobs.glob("*.json"))
    with (paths.home / "starts.txt").open("a") as starts:
        starts.write(f"{plan.sweep_id} {attempt}\n")
    orders = Orders(folder.control, time.time())
    with Ledger(folder.ledger) as ledger:
        orders.forget_older()
        try:
            work(sweep, plan, ledger, orders, paths.home / f"hold-{sweep.spec.name}")
        except Told as told:
            state, reason = told.args
            ledger.append("sweep_finished", state=state, cache_hits=0, reason=reason)
            return 130
        ledger.append("sweep_finished", state="succeeded", cache_hits=0, reason=None)
    return 0


def work(sweep: Sweep, plan: Plan, ledger: Ledger, orders: Orders, hold: Path) -> None:
    """Write down every training and final that is not there yet."""
    pause_s = sweep.spec.limits.infra_retries / 10
    start(sweep, plan, ledger)
    for training in plan.trainings:
        facts: dict[str, Any] = {"training": training.id, "point": training.point}
        facts |= {"seed": training.seed, "phase": "search"}
        if training.id not in ledger.view.trainings:
            ledger.append("training_started", **facts, branch=None)
            take(pause_s, orders, hold)
            ended = {"state": "succeeded", "reason": None, "cached": False, "tries": 1}
            result = train_result(10.0)
            ledger.append("training_finished", **facts, **ended, occupied_s=pause_s, result=result)
    for final in plan.finals:
        known = ledger.view.finals.get(final.id)
        if known is None or known["state"] in RETRIED:
            take(pause_s / 4, orders, hold)
            ledger.append(
                "final_scored",
                final=final.id,
                training=final.training,
                point=final.point,
                seed=final.seed,
                phase="search",
                state="succeeded",
                reason=None,
                cached=False,
                occupied_s=pause_s / 4,
                result=final_result(final.point, 500_000),
            )


def start(sweep: Sweep, plan: Plan, ledger: Ledger) -> None:
    """The event that a run begins with."""
    resources = {"workers": sweep.spec.resources.workers, "gpus_per_worker": 1}
    ledger.append(
        "sweep_started",
        sweep_id=plan.sweep_id,
        name=sweep.spec.name,
        recipe=sweep.spec.recipe,
        spec={"resources": resources, "seeds": {"search": list(sweep.spec.seeds.search)}},
        effective_recipe=sweep.recipe,
        varying=list(plan.varying),
        axes={path: phase_of(path) for path in plan.varying},
        num_trunks=0,
        num_trainings=plan.num_trainings,
        num_finals=plan.num_finals,
        cap_bytes=sweep.cap_bytes,
        facts={},
    )


def take(seconds: float, orders: Orders, hold: Path) -> None:
    """Let time pass until nothing holds us any more, unless somebody wants it otherwise."""
    until = time.monotonic() + seconds
    while True:
        order = orders.now()
        if order is not None:
            raise Told(order.state, order.reason)
        left = until - time.monotonic()
        if left <= 0 and not hold.exists():
            return
        time.sleep(min(0.05, left) if left > 0 else 0.05)


if __name__ == "__main__":
    sys.exit(main())
