"""Stands in for `fairway run` where jobs are tested: a real ledger, written over a second or two.

What it shall do is in the bundle's sweep.yaml:

    sweep_id      whose ledger it writes
    seconds       how long that takes
    holds         where it waits until it is let go by a file HOME/go-PLACE: "gang" (before it has
                  one), "training" (has finished one), "finals" (has finished all trainings)
    dies          by attempt: "kill", or the exit code to leave with, halfway
    dies_late     the same, once it has finished a training
    is_deaf       to orders and SIGTERM
    lingers_s     how long it lives on after the sweep has finished

Every start leaves a line "SWEEP_ID ATTEMPT" in HOME/starts.txt.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from service.control import Orders
from service.ledger import Ledger
from service.states import State
from tests.ledgers import Sweep

LOOK_S = 0.02


class Ended(Exception):
    """It has been told to end: as what, and why."""


class StandIn:
    """One run of a sweep that is made up."""

    def __init__(self, home: Path, told: dict[str, Any]) -> None:
        self.sweep = Sweep(home, sweep_id=told["sweep_id"])
        self.sweep._at = time.time()  # its stages begin now
        self.told = told
        paths = self.sweep.paths.sweep(self.sweep.sweep_id)
        self.orders = Orders(paths.control, time.time())
        self.attempt = max(int(path.stem) for path in paths.jobs.glob("*.json"))
        steps = len(self.sweep.train_points()) * 5
        self.step_s = told.get("seconds", 0.5) / steps

    def run(self) -> int:
        with (self.sweep.paths.home / "starts.txt").open("a") as starts:
            starts.write(f"{self.sweep.sweep_id} {self.attempt}\n")
        with self.sweep.open() as ledger:
            self.orders.forget_older()
            try:
                self.work(ledger)
            except Ended as end:
                state, reason = end.args
                ledger.append("sweep_finished", state=state, cache_hits=0, reason=reason)
                return 130
            self.sweep.finish(ledger)
        time.sleep(self.told.get("lingers_s", 0))
        return 0

    def work(self, ledger: Ledger) -> None:
        self.sweep.start(ledger)
        if "gang" in self.told.get("holds", ()):
            ledger.append("waiting", reason="need 2 GPUs, free 0")
        self.hold_if_told("gang")
        for point in self.sweep.train_points():
            key = self.sweep.begin(ledger, point)
            self.pass_time(2 * self.step_s)
            self.die_if_told("dies")
            if key not in ledger.view.trainings:
                self.sweep.end(ledger, point)
                self.die_if_told("dies_late")
                self.hold_if_told("training")
        for point in self.sweep.train_points():
            self.pass_time(3 * self.step_s)
            self.hold_if_told("finals")
            for final in self.sweep.final_points(point):
                self.sweep.score(ledger, final)

    def die_if_told(self, how: str) -> None:
        end = self.told.get(how, {}).get(str(self.attempt))
        if end == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if end is not None:
            sys.stderr.write("train.iterations=0: at least one; use 1 or more\n")
            os._exit(end)

    def pass_time(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            order = None if self.told.get("is_deaf") else self.orders.now()
            if order is not None:
                raise Ended(order.state, order.reason)
            time.sleep(min(LOOK_S, left))

    def hold_if_told(self, place: str) -> None:
        go = self.sweep.paths.home / f"go-{place}"
        while place in self.told.get("holds", ()) and not go.exists():
            self.pass_time(LOOK_S)


def interrupted(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Ended(State.CANCELLED, "interrupted")


def main() -> None:
    words = sys.argv[1:]
    told = json.loads(Path(words[0]).read_text())  # YAML enough
    handler = signal.SIG_IGN if told.get("is_deaf") else interrupted
    signal.signal(signal.SIGTERM, handler)
    home = Path(words[words.index("--home") + 1])
    sys.stderr.write(f"stand-in: {' '.join(words)}\n")
    sys.exit(StandIn(home, told).run())


if __name__ == "__main__":
    main()
