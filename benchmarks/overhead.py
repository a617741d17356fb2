"""What Fairway costs over the work itself, beside plain Ray Tune and beside an Optuna loop.

    python benchmarks/overhead.py --out /tmp/overhead [--cpus 2] [--trials 60] [--trainings 4]

The work is the same function in each: a sleep of 0 and of 0.05 s for finals, and a real training
of recipe `tiny` for trainings. Overhead is what a slot was held for beyond the work, from the first
piece of work to the last, per piece: starting Ray is paid once by either and shown apart. Optuna
runs in one process, one piece at a time, which is the least that a search can cost.

Then the pause between two trainings of a sweep, from the first one's last step and from its end to
the first step of the second, in a warm gang and with fresh ones.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import Ran, first_step_at, run, steps_of

from service.catalogue_view import data_of
from service.cluster import Where
from service.paths import Paths
from service.trials import Work
from trainer.codec import dump, parse, with_values
from trainer.runtime.files import read_json, write_json
from trainer.specs.recipe import DataSpec, Recipe
from trainer.specs.task import TrainTask, train_task
from tune_spaces.catalogue import load_recipe

Span = tuple[float, float]
"""Unix seconds: when a piece of work began and ended."""

SLEEPS_S = (0.0, 0.05)
MAX_PROCESSES = 12
RATES = (0.02, 0.021, 0.022, 0.023, 0.024, 0.025, 0.026, 0.027)
SETTINGS = {
    "train.schedule.warmdown_iters": 0,
    "observe.validate_every": None,
    "observe.checkpoint_every": None,
    "observe.log_every": 1,
    "evaluate.stride": 256,
}


@dataclass(frozen=True, slots=True)
class Told:
    """What a system took for the same pieces of work."""

    system: str
    work: str
    pieces: int
    overhead_s: float
    """Per piece, in seconds of a slot."""
    start_s: float
    """From the call to the first piece."""


def told(
    system: str, work: str, spans: Sequence[Span], work_s: float, slots: int, at: float
) -> Told:
    """Account for pieces of work that took `work_s` in all, on so many slots, asked for at `at`."""
    first, last = min(began for began, _ in spans), max(ended for _, ended in spans)
    overhead_s = (slots * (last - first) - work_s) / len(spans)
    row = Told(system, work, len(spans), round(overhead_s, 4), round(first - at, 2))
    told_as = f"{row.system:34}{row.work:16}{row.overhead_s:10.4f} s each"
    print(f"{told_as}, start {row.start_s:6.2f} s", flush=True)
    return row


class Bench:
    """What all comparisons share."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.out: Path = arguments.out
        self.cpus: int = arguments.cpus
        self.trials: int = arguments.trials
        self.trainings: int = arguments.trainings
        self.steps: int = arguments.steps
        recipe = load_recipe("tiny", "benchmark")
        self.dataset = data_of(Paths(self.out / "home"), DataSpec(name=recipe["data"]["name"]))
        self.recipe = with_values(recipe, [*SETTINGS.items(), ("train.iterations", self.steps)])

    def sweep(
        self, name: str, trainings: int, finals: int, workers: int, gang: str
    ) -> dict[str, Any]:
        """A sweep of so many trainings and so many finals of each."""
        prunings = [round(0.5 * i / finals, 6) for i in range(finals)]
        return {
            "version": 1,
            "name": name,
            "recipe": "tiny",
            "overrides": {**SETTINGS, "train.iterations": self.steps},
            "space": {
                "train.optimizer.matrix.lr": {"values": list(RATES[:trainings])},
                "final.prune.ratio": {"values": prunings},
            },
            "resources": {"workers": workers, "gang": gang},
            "limits": {"max_concurrent": 1},
        }

    def tasks(self) -> list[TrainTask]:
        """The trainings of the sweep, as the trainer takes them."""
        path = "train.optimizer.matrix.lr"
        recipes = [with_values(self.recipe, [(path, rate)]) for rate in RATES[: self.trainings]]
        return [train_task(parse(Recipe, data, "benchmark")) for data in recipes]


def finals_by_fairway(bench: Bench, seconds: float) -> Told:
    """Finals of one training, both stand-ins, through the engine."""
    from stubs import work_of

    name = f"finals-{int(seconds * 1000)}"
    home, at = bench.out / name, time.time()
    spec = bench.sweep(name, 1, bench.trials, 1, "warm")
    ran = run(spec, home, bench.dataset, Where(num_cpus=bench.cpus), work_of(0.0, seconds))
    spans = [tuple(read_json(path)) for path in home.glob("store/finals/*/times.json")]
    assert len(spans) == len(ran.all("final_scored")) == bench.trials
    return told("Fairway", f"sleep {seconds} s", spans, bench.trials * seconds, bench.cpus, at)


def finals_by_tune(bench: Bench, seconds: float, *, reuse: bool) -> Told:
    """The same sleeps as trials of Ray Tune: as it comes, and with actors kept."""

    def trial(config: dict[str, Any]) -> None:
        from ray import tune

        began = time.time()
        time.sleep(seconds)
        tune.report({"began": began, "ended": time.time(), "loss": config["x"]})

    # A process for each takes seconds: fewer of them say as much.
    at, num = time.time(), bench.trials if reuse else min(bench.trials, MAX_PROCESSES)
    rows = by_tune(trial, list(range(num)), bench.cpus, reuse=reuse)
    spans = [(row["began"], row["ended"]) for row in rows]
    system = "Ray Tune, actors reused" if reuse else "Ray Tune"
    return told(system, f"sleep {seconds} s", spans, num * seconds, bench.cpus, at)


def by_tune(
    trial: Callable[[dict[str, Any]], None], values: list[Any], cpus: int, *, reuse: bool
) -> list[dict[str, Any]]:
    """Run a trial for each value in a Ray of its own; return what they reported.

    Without `reuse` it is Tune as it comes, without our settings of it.
    """
    import logging

    import ray
    from ray import tune

    ours = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("TUNE_")}
    if reuse:
        os.environ.update(ours)
    ray.init(
        num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    try:
        with tempfile.TemporaryDirectory() as storage:
            results = tune.Tuner(
                tune.with_resources(trial, {"CPU": 1}),
                param_space={"x": tune.grid_search(values)},
                tune_config=tune.TuneConfig(reuse_actors=reuse),
                run_config=tune.RunConfig(storage_path=storage, verbose=0),
            ).fit()
            return [result.metrics or {} for result in results]
    finally:
        ray.shutdown()
        os.environ.update(ours)


def finals_by_optuna(bench: Bench, seconds: float) -> Told:
    """The same sleeps in an Optuna loop."""
    spans: list[Span] = []

    def objective(trial: Any) -> float:
        began = time.time()
        x = trial.suggest_float("x", 0.0, 1.0)
        time.sleep(seconds)
        spans.append((began, time.time()))
        return x

    at = time.time()
    _optuna_study().optimize(objective, n_trials=bench.trials)
    return told("Optuna, one process", f"sleep {seconds} s", spans, bench.trials * seconds, 1, at)


def _optuna_study() -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))


def trainings_by_fairway(bench: Bench) -> Told:
    """Real trainings of one worker by a warm gang; their finals are stand-ins."""
    from stubs import final_of

    home, at = bench.out / "trainings", time.time()
    spec = bench.sweep("trainings", bench.trainings, 1, 1, "warm")
    ran = run(spec, home, bench.dataset, Where(num_cpus=bench.cpus), Work(final=final_of(0.0)))
    spans, work_s = [], 0.0
    for event in ran.all("training_finished"):
        seconds = sum(event["result"]["clock_s"].values())
        end = (home / "store/trainings" / event["training"] / "result.json").stat().st_mtime
        spans.append((end - seconds, end))
        work_s += seconds
    return told("Fairway, warm gang", "tiny training", spans, work_s, 1, at)


def trainings_by_tune(bench: Bench) -> Told:
    """The same trainings, each in a trial's own process, one at a time."""
    tasks, folder = [dump(task) for task in bench.tasks()], bench.out / "tune"
    data = bench.dataset.folder.resolve()

    def trial(config: dict[str, Any]) -> None:
        from ray import tune

        tune.report(train_once(tasks[config["x"]], data, folder / str(config["x"])))

    at = time.time()
    rows = by_tune(trial, list(range(len(tasks))), 1, reuse=False)
    return _of_trainings("Ray Tune", rows, at)


def trainings_by_optuna(bench: Bench) -> Told:
    """The same trainings in an Optuna loop."""
    tasks, folder, rows = [dump(task) for task in bench.tasks()], bench.out / "optuna", []

    def objective(trial: Any) -> float:
        index = trial.suggest_int("x", 0, len(tasks) - 1)
        rows.append(train_once(tasks[index], bench.dataset.folder, folder / str(len(rows))))
        return rows[-1]["val_bpb"]

    at = time.time()
    _optuna_study().optimize(objective, n_trials=len(tasks))
    return _of_trainings("Optuna, one process", rows, at)


def train_once(task: dict[str, Any], data: Path, folder: Path) -> dict[str, float]:
    """Train in this process; return when it began and ended, and its own clock's seconds."""
    import torch

    from trainer.data.shards import load_dataset
    from trainer.run import train
    from trainer.runtime.distributed import Ranks

    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    result = train(parse(TrainTask, task, "task"), load_dataset(data), folder, Ranks())
    seconds, end = sum(result.clock_s.values()), time.time()
    return {"began": end - seconds, "ended": end, "work_s": seconds, "val_bpb": result.parity_bpb}


def _of_trainings(system: str, rows: Sequence[dict[str, float]], at: float) -> Told:
    spans = [(row["began"], row["ended"]) for row in rows]
    return told(system, "tiny training", spans, sum(row["work_s"] for row in rows), 1, at)


def pause(bench: Bench, gang: str, workers: int) -> dict[str, float]:
    """The seconds between the first two trainings of a sweep."""
    name = f"pause-{gang}"
    from stubs import final_of

    spec = bench.sweep(name, 2, 1, workers, gang)
    ran = run(
        spec, bench.out / name, bench.dataset, Where(num_cpus=bench.cpus), Work(final=final_of(0.0))
    )
    first, second = (event["training"] for event in ran.all("training_finished"))
    begins = first_step_at(ran.journal(second))
    end = (ran.paths.store / "trainings" / first / "result.json").stat().st_mtime
    found = {
        "last_step_to_first_step_s": round(begins - steps_of(ran.journal(first))[-1]["at"], 2),
        "end_to_first_step_s": round(begins - end, 2),
        "first_gang_start_s": round(_gang_start_s(ran), 2),
    }
    print(f"{gang} gang of {workers}: {found}", flush=True)
    return found


def _gang_start_s(ran: Ran) -> float:
    return ran.first("gang_started")["at"] - ran.first("training_started")["at"]


def main() -> None:
    """Run all comparisons, print each as it ends, write overhead.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--trainings", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30, help="Of each training.")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {arguments.cpus} slots")
    rows: list[Told] = []
    for seconds in SLEEPS_S:
        rows += [
            finals_by_fairway(bench, seconds),
            finals_by_tune(bench, seconds, reuse=False),
            finals_by_tune(bench, seconds, reuse=True),
            finals_by_optuna(bench, seconds),
        ]
    rows += [trainings_by_fairway(bench), trainings_by_tune(bench), trainings_by_optuna(bench)]
    pauses = {gang: pause(bench, gang, arguments.cpus) for gang in ("warm", "fresh")}
    document = {"cores": os.cpu_count(), "rows": [dump_row(row) for row in rows], "pauses": pauses}
    write_json(bench.out / "overhead.json", document)
    for work in dict.fromkeys(row.work for row in rows):
        ours, tune, *_ = (row for row in rows if row.work == work)
        print(f"{work}: {ours.system} / {tune.system} = {ours.overhead_s / tune.overhead_s:.2f}")
    print(json.dumps(document))


def dump_row(row: Told) -> dict[str, Any]:
    """A row as plain data."""
    return {name: getattr(row, name) for name in Told.__slots__}


if __name__ == "__main__":
    main()
