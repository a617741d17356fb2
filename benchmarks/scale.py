"""The engine at 10,000 points, and on several nodes, without the work itself.

    python benchmarks/scale.py --out /tmp/scale [--points 10000] [--cpus 2] [--no-nodes]

Points: finals over five stand-in banks. Planner, store, ledger, Ray Tune and everything between are
the real ones; a final only writes its result. For each tenth of the way: milliseconds a trial,
memory of the driver, bytes of the ledger. Then what an append costs at the end and at the start,
and a replay.

Nodes: a simulated cluster of three nodes (ray.cluster_utils), real gangs of two workers on them.
While others hold a CPU of every node the gangs wait and say why; then they start, each on a node.
"""

import argparse
import json
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from engine import Ran, run
from stubs import final_of, work_of

from service.catalogue_view import data_of
from service.cluster import Where
from service.identity import inputs_of
from service.ledger import Ledger, replay
from service.paths import Paths
from service.plan import make_plan
from service.sweep import load_sweep
from service.trials import Work
from trainer.codec import to_yaml
from trainer.data.shards import Dataset
from trainer.runtime.files import write_json
from trainer.specs.recipe import DataSpec
from tune_spaces.catalogue import load_recipe

BANKS, CLIPS, LEVELS = 5, 10, 20
TENTHS = 10
APPENDS = 200
MICRO = {
    "model.num_layers": 2,
    "model.dim": 32,
    "model.attention.num_heads": 2,
    "model.attention.num_kv_heads": 1,
    "model.attention.rope.dims": 8,
    "train.iterations": 40,
    "train.batch_tokens": 1024,
    "train.seq_len": 128,
    "train.schedule.warmdown_iters": 0,
    "final.quantize.float_numel": 256,
    "evaluate.window": 128,
    "evaluate.stride": 128,
}


def sweep_of(points: int) -> dict[str, Any]:
    """A grid of at least so many finals over five banks."""
    prunings = -(-points // (BANKS * CLIPS * LEVELS))
    axes = {
        "train.optimizer.matrix.lr": [round(0.02 + 0.001 * i, 4) for i in range(BANKS)],
        "final.quantize.clip": [f"sd{6 + i}" for i in range(CLIPS)],
        "final.compress.level": [1 + i for i in range(LEVELS)],
        "final.prune.ratio": [round(0.4 * i / prunings, 6) for i in range(prunings)],
    }
    return {
        "version": 1,
        "name": "scale",
        "recipe": "tiny",
        "overrides": {"train.schedule.warmdown_iters": 0},
        "space": {path: {"values": values} for path, values in axes.items()},
    }


@dataclass
class Growth:
    """Looks at a run from beside it, at every tenth of its finals."""

    ledger: Path
    every: int
    rows: list[dict[str, float]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch for as long as the block lasts."""
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _run(self) -> None:
        since, finals, offset = time.monotonic(), 0, 0
        while not self._stop.wait(0.2):
            if not self.ledger.is_file():
                continue
            with self.ledger.open("rb") as file:
                file.seek(offset)
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            offset += len(whole)
            before, finals = finals, finals + whole.count(b'"event":"final_scored"')
            if before == 0 and finals:
                since, start = time.monotonic(), finals
            if finals // self.every > before // self.every:
                self._note(finals, (time.monotonic() - since) / max(1, finals - start), offset)
                since, start = time.monotonic(), finals

    def _note(self, finals: int, seconds: float, num_bytes: int) -> None:
        row = {
            "finals": finals,
            "ms_per_final": round(1000 * seconds, 2),
            "driver_rss_mib": rss_mib(),
            "ledger_mib": round(num_bytes / 2**20, 2),
        }
        self.rows.append(row)
        print(json.dumps(row), flush=True)


def rss_mib() -> float:
    """Resident memory of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def points(out: Path, dataset: Dataset, num: int, cpus: int) -> dict[str, Any]:
    """Plan and run so many points; then append to and replay the ledger that it left."""
    spec, home = sweep_of(num), out / "home"
    planned = time.monotonic()
    file = out / "plan.yaml"
    file.write_text(to_yaml({**spec, "data": {"name": dataset.name}}))
    plan = make_plan(load_sweep(file), inputs_of(dataset), "scale")
    plan_s = time.monotonic() - planned
    print(f"planned {len(plan.finals)} finals in {plan_s:.1f} s", flush=True)
    growth = Growth(Paths(home).sweep(plan.sweep_id).ledger, max(1, len(plan.finals) // TENTHS))
    with growth.watched():
        ran = run(spec, home, dataset, Where(num_cpus=cpus), work_of(0.0, 0.0))
    scored = len(ran.all("final_scored"))
    again = time.monotonic()
    rerun = run(spec, home, dataset, Where(num_cpus=cpus), work_of(0.0, 0.0))
    return {
        "finals": scored,
        "is_whole": scored == len(plan.finals) and rerun.view.state == "succeeded",
        "plan_s": round(plan_s, 2),
        "run_s": round(ran.seconds, 1),
        "ms_per_final": round(1000 * ran.seconds / scored, 2),
        "run_again_s": round(time.monotonic() - again, 1),
        "peak_driver_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "growth": growth.rows,
        **ledger_costs(growth.ledger, out),
    }


def ledger_costs(ledger: Path, out: Path) -> dict[str, float]:
    """What the whole ledger costs to replay and to append to, beside an empty one."""
    started = time.monotonic()
    view = replay(ledger)
    replay_s = time.monotonic() - started
    full = out / "full.jsonl"
    shutil.copy(ledger, full)
    return {
        "ledger_bytes": ledger.stat().st_size,
        "ledger_events": view.events,
        "bytes_per_final": round(ledger.stat().st_size / max(1, len(view.finals))),
        "replay_s": round(replay_s, 2),
        "append_ms_at_the_end": append_ms(full),
        "append_ms_at_the_start": append_ms(out / "empty.jsonl"),
    }


def append_ms(path: Path) -> float:
    """The median of some appends, each through to the disk."""
    times = []
    with Ledger(path) as ledger:
        for number in range(APPENDS):
            started = time.monotonic()
            ledger.append("waiting", reason=f"to be timed {number}")
            times.append(time.monotonic() - started)
    return round(1000 * median(times), 3)


def nodes(out: Path, dataset: Dataset) -> dict[str, Any]:
    """Gangs of two on three nodes of two CPUs, after a wait while each node has one CPU only."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    rates = [round(0.02 + 0.001 * i, 4) for i in range(4)]
    spec = {
        "version": 1,
        "name": "nodes",
        "recipe": "tiny",
        "overrides": MICRO,
        "space": {"train.optimizer.matrix.lr": {"values": rates}},
        "resources": {"workers": 2, "start_timeout_s": 300},
    }
    try:
        with held_by_others(cluster.address, 3, out):
            where = Where(address=cluster.address)
            ran = run(spec, out / "nodes", dataset, where, Work(final=final_of(0.0)))
    finally:
        if ray.is_initialized():
            ray.shutdown()
        cluster.shutdown()
    return told_of_nodes(ran)


def told_of_nodes(ran: Ran) -> dict[str, Any]:
    """Which gangs started where, and what was said while they waited."""
    started = ran.all("gang_started")
    places = [sorted({rank["node"] for rank in event["nodes"]}) for event in started]
    waited = [event["reason"] for event in ran.all("waiting")]
    done = [event["state"] for event in ran.all("training_finished")]
    return {
        "gangs": len({event["gang"] for event in started}),
        "nodes_used": len({node for place in places for node in place}),
        "each_on_one_node": all(len(place) == 1 for place in places),
        "waiting": waited,
        "trainings": done,
        "seconds": round(ran.seconds, 1),
        "is_whole": set(done) == {"succeeded"} and bool(waited),
    }


@contextmanager
def held_by_others(address: str, num: int, out: Path) -> Iterator[None]:
    """Have a process of its own hold one CPU of so many nodes until the engine waits for them."""
    holds, ledgers = out / "held", out / "nodes" / "sweeps"
    process = get_context("spawn").Process(target=hold, args=(address, num, holds, ledgers))
    process.start()
    try:
        while not holds.exists() and process.is_alive():
            time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.join()


def hold(address: str, num: int, holds: Path, ledgers: Path) -> None:
    """Hold one CPU of so many nodes; let them go once a ledger says that a gang waits."""
    import ray
    from ray.util.placement_group import placement_group

    ray.init(address, log_to_driver=False)
    ray.get(placement_group([{"CPU": 1}] * num, strategy="STRICT_SPREAD").ready())
    holds.write_text("")
    while not any('"event":"waiting"' in path.read_text() for path in ledgers.glob("*/*.jsonl")):
        time.sleep(0.2)


def main() -> None:
    """Run both parts, print and write what they showed; exit 1 if one is not whole."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--points", type=int, default=10_000)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--no-nodes", action="store_true")
    arguments = parser.parse_args()
    data = load_recipe("tiny", "benchmark")["data"]
    dataset = data_of(Paths(arguments.out / "home"), DataSpec(name=data["name"]))
    told = {"points": points(arguments.out, dataset, arguments.points, arguments.cpus)}
    write_json(arguments.out / "scale.json", told)
    if not arguments.no_nodes:
        told["nodes"] = nodes(arguments.out, dataset)
        write_json(arguments.out / "scale.json", told)
    print(json.dumps(told, indent=1))
    sys.exit(0 if all(part["is_whole"] for part in told.values()) else 1)


if __name__ == "__main__":
    main()
