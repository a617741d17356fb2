"""A gang at its real size: start, pace, scaling, finals, and a killed worker, one phase at a time.

    python benchmarks/gang.py --workers 8 --minutes 10 --kill --out /tmp/gang \
        --train train.bin.xz --val val.bin.xz --tokenizer fineweb_1024_bpe.model
    python benchmarks/gang.py --workers 2 --recipe tiny --steps 120 --finals 8 --kill \
        --device cpu --out /tmp/gang                     # the same on two CPU cores, shipped text

Every phase is a sweep of one training through the engine, in a Ray of its own on this machine:

    gang   N workers at the recipe's batch, then `--finals` finals, each on one GPU (CPU)
    one    1 worker at 1/N of the batch, so with as many tokens as each of the N had
    same   (--same-batch) 1 worker at the whole batch: the loss curve that the gang's must follow
    kill   (--kill) N workers again; one gets SIGKILL after a checkpoint; seconds to the next step

Efficiency is the step of `one` over the step of `gang`. NCCL_* variables stay as they are found.
--out gets PHASE.json when a phase ends, and summary.json; the same command again goes on from
there.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import (
    Killer,
    PeakMemory,
    Ran,
    dataset_of_shards,
    run,
    step_seconds,
    times_of,
)

from service.catalogue_view import data_of
from service.cluster import Where
from service.facts import environment
from service.paths import Paths
from trainer.codec import parse_assignment, with_values
from trainer.data.prepare import Settings, prepare
from trainer.data.shards import Dataset, load_dataset
from trainer.errors import FairwayError
from trainer.runtime.files import read_json, write_json
from trainer.specs.recipe import DataSpec
from tune_spaces.catalogue import load_recipe

DATA = "given"  # the dataset's name where shards are given
WARMDOWN_SHARE = 0.5  # of a run by the clock, as pr414 had it on its eight H100s
EMA_DECAYS = (0.997, 0.995, 0.99, 0.98)
CLIPS = ("p5", "none", "sd12.85", "p9", "sd20")
KILL_CHECKPOINTS = 4  # that many in the killed training
KILL_SEED = 7  # another training than the first
LOG_EVERY = 10
CURVE_POINTS = 60


class Bench:
    """What all phases share."""

    def __init__(self, arguments: argparse.Namespace, dataset: Dataset) -> None:
        self.arguments = arguments
        self.dataset = dataset
        self.home: Path = arguments.out / "home"
        self.given = dict(parse_assignment(text) for text in arguments.set or ())
        self.recipe = with_values(load_recipe(arguments.recipe, "--recipe"), self.given.items())
        self.batch: int = self.recipe["train"]["batch_tokens"]
        self.is_cuda = arguments.device == "cuda"
        self.done: dict[str, dict[str, Any]] = {}

    def sweep(
        self,
        phase: str,
        workers: int,
        overrides: dict[str, Any],
        space: dict[str, Any],
        seed: int = 1337,
    ) -> Ran:
        """Run a sweep of one training; `overrides` of the phase come after those of -S."""
        arguments = self.arguments
        spec = {
            "version": 1,
            "name": f"gang-{phase}",
            "recipe": arguments.recipe,
            "overrides": {**self.given, **overrides},
            "space": space,
            "seeds": {"search": [seed]},
            "resources": {
                "workers": workers,
                "cpus_per_worker": arguments.cpus_per_worker,
                "gpus_per_worker": int(self.is_cuda),
                "start_timeout_s": 120,
            },
            "limits": {"max_concurrent": 1},
            "budget": {"deadline_hours": arguments.limit_s / 3600},
        }
        cpus = max(os.cpu_count() or 1, workers * arguments.cpus_per_worker)
        return run(spec, self.home, self.dataset, Where(num_cpus=cpus))

    def length(self, steps: int) -> dict[str, Any]:
        """Overrides of a training of so many steps at full learning rate."""
        by_steps = self.recipe["train"].get("schedule", {}).get("basis", "steps") == "steps"
        return {
            "train.iterations": steps,
            "observe.log_every": min(LOG_EVERY, max(1, steps // 10)),
            "observe.validate_every": None,
            **({"train.schedule.warmdown_iters": 0} if by_steps else {}),
        }

    def short(self, steps: int) -> dict[str, Any]:
        """Overrides of a training that only shows its pace: its finals are scored in blocks."""
        return {**self.length(steps), "evaluate.stride": self.recipe["evaluate"]["window"]}

    def gang(self) -> dict[str, Any]:
        """The gang's training, and all of its finals."""
        arguments = self.arguments
        length = {
            "train.iterations": 1_000_000,
            "train.max_clock_s": 60.0 * (arguments.minutes or 0),
            "train.schedule.basis": "wallclock",
            "train.schedule.warmdown_iters": 0,
            "train.schedule.warmdown_fraction": WARMDOWN_SHARE,
            "observe.log_every": LOG_EVERY,
        }
        if arguments.steps is not None:
            length = self.length(arguments.steps)
        ran = self.sweep("main", arguments.workers, length, final_space(arguments.finals))
        return self._told(ran, arguments.workers, self.batch)

    def one(self) -> dict[str, Any]:
        """One worker with as many tokens as each worker of the gang had."""
        batch = self.batch // self.arguments.workers
        overrides = {**self.short(self.arguments.one_steps), "train.batch_tokens": batch}
        return self._told(self.sweep("one", 1, overrides, self._averages()), 1, batch)

    def same_batch(self) -> dict[str, Any]:
        """One worker with the gang's batch: how far the two loss curves lie apart."""
        steps = self.arguments.same_batch
        ran = self.sweep("same", 1, self.short(steps), self._averages())
        told = self._told(ran, 1, self.batch)
        gang = {step: loss for step, loss in self.done["gang"]["loss"] if step <= steps}
        pairs = [(gang[step], loss) for step, loss in told["loss"] if step in gang]
        apart = [abs(ours - loss) for ours, loss in pairs]
        return {
            **told,
            "compared_points": len(pairs),
            "mean_difference": sum(apart) / len(apart) if apart else None,
            "largest_difference": max(apart, default=None),
        }

    def kill(self) -> dict[str, Any]:
        """The gang once more; one of its workers is killed with SIGKILL after a checkpoint."""
        arguments = self.arguments
        every = max(1, arguments.kill_steps // KILL_CHECKPOINTS)
        seen = {"observe.checkpoint_every": every, "observe.log_every": 1}
        overrides = self.short(arguments.kill_steps) | seen
        killer = Killer(self.home / "store" / "trainings", arguments.workers - 1, every)
        with killer:
            ran = self.sweep("kill", arguments.workers, overrides, {}, seed=KILL_SEED)
        ended = ran.first("training_finished")
        return {
            **killer.told(ran.journal(ended["training"])),
            "checkpoint_every": every,
            "tries": ended["tries"],
            "state": ended["state"],
            "gang_starts": len(ran.all("gang_started")),
        }

    def _averages(self) -> dict[str, Any]:
        """The averages that the gang keeps: keeping them is part of a step."""
        path = "train.averages.ema_decay"
        return {path: final_space(self.arguments.finals)[path]}

    def _told(self, ran: Ran, workers: int, batch: int) -> dict[str, Any]:
        ended = ran.first("training_finished")
        if ended["result"] is None:
            raise FairwayError(f"the training ended as {ended['state']}: {ended['reason']}")
        lines = ran.journal(ended["training"])
        pace, result = step_seconds(lines), ended["result"]
        finals = ran.all("final_scored")
        scored = [final["result"] for final in finals if final["result"]]
        return {
            "workers": workers,
            "batch_tokens": batch,
            "steps": result["steps"],
            "ms_per_step": round(1000 * pace, 3),
            "mean_ms_per_step": round(1000 * result["train_clock_s"] / result["steps"], 3),
            "tokens_per_s": round(batch / pace),
            "num_params": result["num_params"],
            "parity_bpb": result["parity_bpb"],
            "best_bpb": min((final["score"]["val_bpb"] for final in scored), default=None),
            "artifact_bytes": sorted({final["artifact_bytes"] for final in scored}),
            "finals": dict(Counter(final["state"] for final in finals)),
            "clock_s": result["clock_s"],
            **times_of(ran, ended["training"]),
            "preflight": ran.warnings,
            "nodes": ran.first("gang_started")["nodes"],
            "probe": ran.first("gang_started")["probe"],
            "loss": curve(lines, "train/loss"),
            "val_bpb": curve(lines, "val/bpb"),
        }


def final_space(num: int) -> dict[str, Any]:
    """A grid of exactly so many finals: averages, clips and prunings, as they divide it."""
    decays = next(n for n in (4, 2, 1) if num % n == 0)
    clips = next(n for n in (5, 4, 3, 2, 1) if (num // decays) % n == 0)
    prunings = [round(0.01 * i, 4) for i in range(num // decays // clips)]
    axes = {
        "train.averages.ema_decay": list(EMA_DECAYS[:decays]),
        "final.quantize.clip": list(CLIPS[:clips]),
        "final.prune.ratio": prunings,
    }
    return {path: {"values": values} for path, values in axes.items()}


def curve(lines: list[dict[str, float]], series: str) -> list[tuple[int, float]]:
    """A series by step, thinned evenly; its ends stay."""
    points = [(int(line["step"]), line[series]) for line in lines if series in line]
    stride = max(1, len(points) // CURVE_POINTS)
    return points[::stride] + ([points[-1]] if points[-1:] != points[::stride][-1:] else [])


def settings() -> dict[str, Any]:
    """What a reader must know of the machine and of how NCCL was set."""
    import torch

    is_cuda = torch.cuda.is_available()
    kept = ("NCCL_", "TORCH_SYMM_MEM", "NVSHMEM_", "TORCH_NCCL_", "CUDA_VISIBLE")
    return {
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if is_cuda else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "cpus": os.cpu_count(),
        "env": {k: v for k, v in sorted(os.environ.items()) if k.startswith(kept)},
    }


def main() -> None:
    """Run the phases in order, write each when it ends, print one table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_AsWritten)
    parser.add_argument("--workers", type=int, required=True)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="The training's clock.")
    length.add_argument("--steps", type=int)
    parser.add_argument("--recipe", default="pr414")
    parser.add_argument("--data", type=Path, help="A prepared dataset's folder.")
    parser.add_argument("--train", type=Path, nargs="+", default=[], help="Shards, bare or .xz.")
    parser.add_argument("--text", type=Path, nargs="+", help="Documents to train on, instead.")
    parser.add_argument("--val", type=Path, nargs="+", default=[])
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--cpus-per-worker", type=int, default=1)
    parser.add_argument("--finals", type=int, default=40)
    parser.add_argument("--one-steps", type=int, default=60, help="0: no comparison with 1 worker.")
    parser.add_argument("--same-batch", type=int, default=0, metavar="STEPS")
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--kill-steps", type=int, default=80)
    parser.add_argument("--limit-s", type=float, default=900.0, help="Each phase's deadline.")
    parser.add_argument("-S", dest="set", action="append", metavar="PATH=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    bench = Bench(arguments, dataset_for(arguments))
    phases: dict[str, Callable[[], dict[str, Any]]] = {"gang": bench.gang}
    if arguments.workers > 1 and arguments.one_steps:
        phases["one"] = bench.one
    if arguments.workers > 1 and arguments.same_batch:
        phases["same"] = bench.same_batch
    if arguments.kill:
        phases["kill"] = bench.kill
    facts = {"settings": settings(), "facts": environment(bench.dataset)}
    write_json(arguments.out / "machine.json", facts)
    is_whole = all([run_phase(bench, name, phase) for name, phase in phases.items()])
    summary = {"workers": arguments.workers, "recipe": arguments.recipe, **headline(bench.done)}
    write_json(arguments.out / "summary.json", {**summary, "phases": bench.done, **facts})
    print_table(bench.done, summary, facts["settings"])
    print(json.dumps(summary), flush=True)
    sys.exit(0 if is_whole else 1)


class _AsWritten(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description."""


def dataset_for(arguments: argparse.Namespace) -> Dataset:
    """The dataset that was named, made of the shards that were given, or the recipe's own."""
    if arguments.data is not None:
        return load_dataset(arguments.data)
    home, shards = Paths(arguments.out / "home"), list(arguments.train)
    if arguments.text:
        text = arguments.out / "text"
        if not text.exists():
            whole = Settings(val_fraction=0.01, holdout_fraction=0.0)
            prepare(arguments.text, text, whole, tokenizer=arguments.tokenizer)
        shards = sorted(text.glob("*_train_*.bin"))
    if not shards:
        data = load_recipe(arguments.recipe, "--recipe")["data"]
        return data_of(home, DataSpec(name=data["name"]))
    return dataset_of_shards(home.data(DATA), DATA, shards, arguments.val, arguments.tokenizer)


def run_phase(bench: Bench, name: str, phase: Callable[[], dict[str, Any]]) -> bool:
    """Run a phase and write what it found, or why it found nothing; whether it is whole.

    One that an earlier call of this program finished is not run again.
    """
    file: Path = bench.arguments.out / f"{name}.json"
    if file.is_file() and "error" not in (known := read_json(file)):
        bench.done[name] = known
        return True
    started = time.monotonic()
    try:
        with PeakMemory(bench.arguments.device) as memory:
            told = phase()
    except Exception as error:  # of this phase: the others are worth having without it
        traceback.print_exc()
        told = {"error": f"{type(error).__name__}: {error}"}
    told |= {"peak_memory_gib": memory.gib, "phase_s": round(time.monotonic() - started, 1)}
    bench.done[name] = told
    write_json(file, told)
    shown = {k: v for k, v in told.items() if isinstance(v, int | float | str)}
    print(f"phase {name} ended: {json.dumps(shown)}", flush=True)
    return "error" not in told


def headline(done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures that the benchmark is for, as far as their phases came."""
    gang, one = done.get("gang", {}), done.get("one", {})
    paces = one.get("ms_per_step"), gang.get("ms_per_step")
    names = (
        "tokens_per_s",
        "ms_per_step",
        "request_to_gang_s",
        "request_to_first_step_s",
        "last_step_to_first_score_s",
        "all_finals_s",
        "best_bpb",
        "peak_memory_gib",
    )
    return {
        **{name: gang.get(name) for name in names},
        "one_worker_ms_per_step": paces[0],
        "efficiency": round(paces[0] / paces[1], 4) if all(paces) else None,
        "kill_to_next_step_s": done.get("kill", {}).get("kill_to_next_step_s"),
        "curve_difference": done.get("same", {}).get("mean_difference"),
    }


def print_table(
    done: dict[str, dict[str, Any]], summary: dict[str, Any], machine: dict[str, Any]
) -> None:
    """One line a figure."""
    print(f"\n{machine['gpus'] or machine['cpus']}, NCCL {machine['nccl']}, {machine['env']}")
    for name, value in summary.items():
        print(f"{name:30}{value}")
    for phase, told in done.items():
        if "error" in told:
            print(f"{phase}: {told['error']}")


if __name__ == "__main__":
    main()
