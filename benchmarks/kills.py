"""Random kills over small sweeps: every run ends with what an undisturbed one has, each once.

    python benchmarks/kills.py --out /tmp/kills [--kills 50] [--per-sweep 5] [--seed 0]

A sweep of two trainings that share a trunk, and their eight finals, is run once in peace. Then it
is run again and again in homes of their own, by the real command line, and at random moments
something gets SIGKILL; where that ended the command, it is run again:

    worker   a rank of the gang, or a final's process where no gang is at work
    trial    the process in which a trial of Ray Tune waits or works
    raylet   the second node of a cluster of two; a new one joins
    all      the command, its whole Ray and every process below, at once

Every other sweep runs on a cluster of two nodes on this machine (ray.cluster_utils), the others in
a Ray of their own. A moment is a share of the undisturbed run's progress: lines of its journals and
finals that were scored. Exit 1 if any sweep's results differ.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from killing import holders_of, kill, processes_below, titled

SWEEP = """\
version: 1
name: kills
recipe: tiny
overrides:
  model: {num_layers: 2, dim: 32, attention: {num_heads: 2, num_kv_heads: 1, rope: {dims: 8}}}
  train: {iterations: 200, batch_tokens: 1024, seq_len: 128}
  final.quantize.float_numel: 256
  evaluate: {window: 128, stride: 128, batch_windows: 32}
  observe: {log_every: 5, validate_every: null, checkpoint_every: 10}
space:
  train.schedule.warmdown_iters: {values: [30, 60]}
  train.averages.ema_decay:      {values: [0.8, 0.9]}
  final.quantize.clip:           {values: [none, p5]}
constraints: [artifact_bytes <= 1_000_000, audit == pass]
resources: {workers: 2, start_timeout_s: 300}
limits: {max_concurrent: 1, infra_retries: 20}
"""
FINALS = 8
KINDS = {"local": ("worker", "trial", "all"), "two nodes": ("worker", "trial", "raylet", "all")}
TRIAL = ("ray::ImplicitFunc",)
PATIENCE_S = 600.0


@dataclass
class Sweep:
    """A sweep in a home of its own, run by the command line."""

    root: Path
    nodes: "Nodes | None" = None
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0

    @property
    def home(self) -> Path:
        return self.root / "home"

    def start(self) -> None:
        """Run the command, or run it again."""
        self.home.mkdir(parents=True, exist_ok=True)
        file = self.root / "sweep.yaml"
        file.write_text(SWEEP)
        where = ["--num-cpus", "2"] if self.nodes is None else ["--address", self.nodes.address]
        words = [sys.executable, "-m", "service", "run", str(file), "--home", str(self.home)]
        with (self.root / "run.log").open("ab") as log:
            self.process = subprocess.Popen([*words, *where], stdout=log, stderr=log)
        self.starts += 1

    def progress(self) -> int:
        """Lines of the trunk's and the tails' journals, and ten for every final that is scored."""
        trunk, tails = (
            [num_lines(path) for path in self.home.glob(f"store/{journals}")]
            for journals in ("states/**/metrics.jsonl", "trainings/*/metrics.jsonl")
        )
        # A trunk's journal is in each of its states, and a tail's begins with it.
        lines = max(trunk, default=0) + sum(max(0, tail - min(trunk)) for tail in tails if trunk)
        return lines + 10 * len(list(self.home.glob("store/finals/*/result.json")))

    def processes(self) -> list[int]:
        """The command's own processes, and those of its cluster."""
        assert self.process is not None
        return processes_below(self.process.pid if self.nodes is None else os.getpid())

    def ranks(self) -> list[int]:
        """The processes of the gang that is at work."""
        logs = self.home.glob("store/*/*/rank*.log")
        return [pid for log in logs for pid in holders_of(log, self.processes())]

    def events(self) -> list[dict[str, Any]]:
        """What the ledger says."""
        from service.ledger import read

        (ledger,) = self.home.glob("sweeps/kills-*/events.jsonl")
        return list(read(ledger))

    def results(self) -> dict[str, Any]:
        """What every stage came to, without what a clock says."""
        found: dict[str, Any] = {}
        for event in self.events():
            key, result = json.dumps(event.get("point"), sort_keys=True), event.get("result")
            if event["event"] == "training_finished" and result:
                found[key] = [result["parity_bpb"], result["final_train_loss"], result["steps"]]
            if event["event"] == "final_scored" and result:
                score = result["score"]["val_bpb"]
                found[key] = [result["weights_sha256"], result["artifact_bytes"], score]
        return found

    def doubled(self) -> list[str]:
        """The stages that the ledger has more than once."""
        ended = Counter(
            event.get("final") or event.get("training")
            for event in self.events()
            if event["event"] in ("training_finished", "final_scored")
        )
        return [str(stage) for stage, times in ended.items() if times > 1]


def num_lines(path: Path) -> int:
    """The lines of a file, none once it is gone."""
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


class Nodes:
    """A cluster of two nodes on this machine, which the command joins by its address."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
        self.second = self.cluster.add_node(num_cpus=2)

    @property
    def address(self) -> str:
        return self.cluster.address

    def replace_second(self) -> None:
        """Kill the second node's raylet; another node joins."""
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = self.cluster.add_node(num_cpus=2)

    def end(self) -> None:
        """Kill all of it."""
        self.cluster.shutdown()


@dataclass
class Kill:
    """A kill as it was planned, and what it hit."""

    sweep: int
    place: str
    kind: str
    at: int
    """The progress from which on it is due."""
    hit: str = "came too late"
    outcome: str = ""


@dataclass
class Campaign:
    """All sweeps that are disturbed, and what they are held against."""

    root: Path
    undisturbed: dict[str, Any]
    whole: int
    done: list[Kill] = field(default_factory=list)

    def disturb(self, number: int, place: str, planned: Sequence[Kill]) -> None:
        """Run one sweep to its end through its kills, and judge it."""
        sweep = Sweep(self.root / f"sweep-{number:02}", Nodes() if place == "two nodes" else None)
        try:
            sweep.start()
            for each in planned:
                strike(sweep, each, self.whole)
            code = finish(sweep)
            outcome = self.judge(sweep, code)
        finally:
            end(sweep)
        for each in planned:
            each.outcome = outcome
            print(f"{each.sweep:3} {place:10}{each.kind:8}{each.hit:44}{outcome}", flush=True)
        self.done += planned

    def judge(self, sweep: Sweep, code: int) -> str:
        """Whether a sweep ended as the undisturbed one: `same`, or how not."""
        if code:
            return f"exit {code}, see {sweep.root}/run.log"
        if sweep.results() != self.undisturbed:
            return "other results"
        doubled = sweep.doubled()
        return f"{len(doubled)} stages twice in the ledger" if doubled else "same"


def strike(sweep: Sweep, each: Kill, whole: int) -> None:
    """Wait for the moment and kill; start the command again if that ended it."""
    deadline = time.monotonic() + PATIENCE_S
    while sweep.progress() < each.at and time.monotonic() < deadline:
        assert sweep.process is not None
        if sweep.process.poll() is not None:
            return
        time.sleep(0.05)
    moment = f"at {sweep.progress() / whole:.0%}"
    hit = {"worker": hit_worker, "trial": hit_trial, "raylet": hit_raylet, "all": hit_all}
    each.hit = f"{hit[each.kind](sweep)} {moment}"


def hit_worker(sweep: Sweep) -> str:
    """A rank; between trainings a final's process."""
    ranks = sweep.ranks()
    if ranks and kill(random.Random(len(ranks)).choice(ranks)):
        return "a rank"
    return hit_trial(sweep)


def hit_trial(sweep: Sweep) -> str:
    """A trial's process."""
    trials = titled(TRIAL, sweep.processes())
    return "a trial's process" if trials and kill(trials[0]) else "nothing was up"


def hit_raylet(sweep: Sweep) -> str:
    """The second node."""
    assert sweep.nodes is not None
    was_at_work = bool(sweep.ranks())
    sweep.nodes.replace_second()
    return f"the second node, gang {'at work' if was_at_work else 'idle'}"


def hit_all(sweep: Sweep) -> str:
    """The command and its Ray; both are started again."""
    assert sweep.process is not None
    pids = [sweep.process.pid, *processes_below(sweep.process.pid)]
    num = sum(kill(pid) for pid in pids)
    sweep.process.wait()
    if sweep.nodes is not None:
        sweep.nodes.end()
        sweep.nodes = Nodes()
    sweep.start()
    return f"{num} processes" if sweep.nodes is None else "the command and both nodes"


def finish(sweep: Sweep) -> int:
    """Wait for the end; a command that a kill took down is run again, once."""
    assert sweep.process is not None
    code = sweep.process.wait(timeout=PATIENCE_S)
    if code:
        sweep.start()
        code = sweep.process.wait(timeout=PATIENCE_S)
    return code


def end(sweep: Sweep) -> None:
    """Leave nothing running."""
    if sweep.process is not None and sweep.process.poll() is None:
        for pid in [sweep.process.pid, *processes_below(sweep.process.pid)]:
            kill(pid)
        sweep.process.wait()
    if sweep.nodes is not None:
        sweep.nodes.end()


def plan_kills(num: int, per_sweep: int, whole: int, seed: int) -> list[list[Kill]]:
    """So many kills, spread over sweeps: kinds and moments by the seed, in order of moment."""
    draw, sweeps = random.Random(seed), []
    for number in range(-(-num // per_sweep)):
        place = ("local", "two nodes")[number % 2]
        count = min(per_sweep, num - number * per_sweep)
        moments = sorted(draw.sample(range(1, whole - 10), count))
        sweeps.append([Kill(number, place, draw.choice(KINDS[place]), at) for at in moments])
    return sweeps


def main() -> None:
    """Run in peace, then through the kills; print a line for each kill and the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--per-sweep", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = os.getcwd()
    os.environ["OMP_NUM_THREADS"] = "1"
    started, peace = time.monotonic(), Sweep(arguments.out / "peace")
    peace.start()
    if code := finish(peace):
        sys.exit(f"the undisturbed run ended with {code}: see {peace.root}/run.log")
    whole = peace.progress()
    print(f"undisturbed: {time.monotonic() - started:.0f} s, progress {whole}", flush=True)
    campaign = Campaign(arguments.out, peace.results(), whole)
    for number, planned in enumerate(
        plan_kills(arguments.kills, arguments.per_sweep, whole, arguments.seed)
    ):
        campaign.disturb(number, planned[0].place, planned)
    struck = [each for each in campaign.done if each.hit != Kill.hit]
    print(
        f"{len(struck)} of {len(campaign.done)} kills struck, "
        f"{Counter(each.kind for each in struck)}; {time.monotonic() - started:.0f} s"
    )
    print(f"outcomes: {dict(Counter(each.outcome for each in campaign.done))}")
    sys.exit(0 if all(each.outcome == "same" for each in campaign.done) else 1)


if __name__ == "__main__":
    main()
