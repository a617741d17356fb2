"""320 points from one trunk: 4 warmdowns x 4 averages x 5 clips x 4 prunings of recipe `tiny`.

    python benchmarks/grid320.py --out /tmp/grid [--check 3] [--workers 1] [--cpus 2]

Warmdowns of 5, 10, 15 and 20 % of the run share a trunk, so four trainings cost less than one and
a half. Afterwards each of the four is trained straight from step 0, by the trainer alone, and its
bank and `--check` of its finals are compared with the sweep's, bit for bit. Finals are scored in
blocks without overlap, which is all that is cut from the recipe.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import Ran, run

from service.catalogue_view import data_of
from service.cluster import Where
from service.identity import inputs_of
from service.paths import Paths
from service.plan import Plan, Training, make_plan
from service.sweep import load_sweep
from trainer.codec import dump
from trainer.data.shards import Dataset
from trainer.runtime.files import write_json
from trainer.specs.recipe import DataSpec
from tune_spaces.catalogue import load_recipe

SHARES = (0.05, 0.10, 0.15, 0.20)
SPACE = {
    "train.averages.ema_decay": [0.9, 0.95, 0.97, 0.98],
    "final.quantize.clip": ["none", "p5", "sd12", "sd10", "p9"],
    "final.prune.ratio": [0.0, 0.02, 0.05, 0.1],
}
MAX_SHARE_OF_FOUR, MAX_SHARE_OF_ALL = 0.37, 0.005


def sweep_of(iterations: int, window: int, workers: int) -> dict[str, Any]:
    """The sweep file, as a mapping."""
    warmdowns = [round(share * iterations) for share in SHARES]
    axes = {"train.schedule.warmdown_iters": warmdowns, **SPACE}
    return {
        "version": 1,
        "name": "grid320",
        "recipe": "tiny",
        "overrides": {"train.iterations": iterations, "evaluate.stride": window},
        "space": {path: {"values": values} for path, values in axes.items()},
        "resources": {"workers": workers},
    }


def counted(ran: Ran, iterations: int) -> dict[str, Any]:
    """What the ledger says was trained, beside what straight trainings would have taken."""
    trunks = ran.all("trunk_finished")
    trainings = ran.all("training_finished")
    finals = ran.all("final_scored")
    trunk_steps = sum(event["steps_computed"] for event in trunks)
    tail_steps = [event["result"]["steps_computed"] for event in trainings]
    trained = trunk_steps + sum(tail_steps)
    return {
        "trunks": len(trunks),
        "tails": len([event for event in ran.all("training_started") if event["branch"]]),
        "finals": len({event["final"] for event in finals}),
        "states": dict(Counter(event["state"] for event in finals)),
        "trunk_steps": trunk_steps,
        "tail_steps": tail_steps,
        "trained_steps": trained,
        "share_of_four": trained / (len(trainings) * iterations),
        "share_of_all": trained / (len(finals) * iterations),
        "seconds": round(ran.seconds, 1),
        "final_s": round(sum(event["occupied_s"] for event in finals) / len(finals), 3),
    }


@dataclass(frozen=True, slots=True)
class Straight:
    """The straight way: the trainer alone, in this process, into a folder of its own."""

    plan: Plan
    dataset: Dataset
    folder: Path
    ran: Ran

    def differences(self, training: Training, checked: int) -> list[str]:
        """Train from step 0, make and score some finals; say what is not the sweep's."""
        import torch

        from trainer.artifacts import make_artifact
        from trainer.run import check_parity, finalize, train
        from trainer.runtime.distributed import Ranks
        from trainer.specs.task import artifact_task

        torch.set_num_threads(1)
        alone, own = Ranks(), self.folder / training.id
        train(training.task, self.dataset, own, alone)
        parity = check_parity(own, self.dataset, own / "parity", alone).rule
        theirs = self.ran.paths.store / "trainings" / training.id
        found = [f"{training.id}: {name}" for name in unlike(own / "bank", theirs / "bank")]
        finals = [final for final in self.plan.finals if final.training == training.id]
        scored = {event["final"]: event["result"] for event in self.ran.all("final_scored")}
        for final in random.Random(0).sample(finals, checked):
            made, done = own / f"made-{final.id}", own / f"final-{final.id}"
            make_artifact(artifact_task(final.task), own, self.dataset, made, None, alone)
            result = finalize(final.task, own, made, self.dataset, done, parity, alone)
            if facts(dump(result)) != facts(scored[final.id]):
                found.append(f"{final.id} at {final.point}: {facts(dump(result))}")
        return found


def unlike(own: Path, theirs: Path) -> list[str]:
    """The tensors of two banks that are not the same bit for bit."""
    import torch

    from trainer.runtime.tensors import load_tensors, saved_names

    names = saved_names(own)
    found = [] if names == saved_names(theirs) else ["the entries"]
    for entry in names:
        mine, other = load_tensors(own, entry), load_tensors(theirs, entry)
        found += [f"{entry}/{name}" for name in mine if not torch.equal(mine[name], other[name])]
    return found


def facts(result: dict[str, Any]) -> tuple[str, int, float]:
    """What a final is compared by."""
    return result["weights_sha256"], result["artifact_bytes"], result["score"]["val_bpb"]


def verdicts(told: dict[str, Any], plan: Plan, iterations: int) -> dict[str, bool]:
    """What has to hold."""
    departures = [round((1 - share) * iterations) for share in SHARES]
    expected = max(departures) + sum(iterations - step for step in departures)
    return {
        "1 trunk, 4 tails, 320 finals": (told["trunks"], told["tails"], told["finals"])
        == (1, 4, 320),
        f"trained steps are trunk + tails, {expected}": told["trained_steps"] == expected,
        "at most 37 % of four straight trainings": told["share_of_four"] <= MAX_SHARE_OF_FOUR,
        "at most 0.5 % of 320": told["share_of_all"] <= MAX_SHARE_OF_ALL,
        "the plan said so": len(plan.trunks) == 1 and len(plan.finals) == 320,
    }


def main() -> None:
    """Run the sweep, check it, print what holds; exit 1 if something does not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--check", type=int, default=3, help="Finals of each straight training.")
    arguments = parser.parse_args()
    recipe = load_recipe("tiny", "benchmark")
    iterations, window = recipe["train"]["iterations"], recipe["evaluate"]["window"]
    home = arguments.out / "home"
    dataset = data_of(Paths(home), DataSpec(name=recipe["data"]["name"]))
    spec = sweep_of(iterations, window, arguments.workers)
    ran = run(spec, home, dataset, Where(num_cpus=arguments.cpus))
    sweep = load_sweep(home / "grid320.yaml")
    plan = make_plan(sweep, inputs_of(dataset), "grid320")
    told = counted(ran, iterations)
    print(json.dumps(told, indent=1), flush=True)
    held = verdicts(told, plan, iterations)
    if arguments.workers == 1:  # a gang sums in another order than one process
        held |= compared(Straight(plan, dataset, arguments.out / "straight", ran), arguments.check)
    write_json(arguments.out / "grid320.json", {**told, "held": held})
    for claim, is_true in held.items():
        print(f"{'yes' if is_true else 'NO ':4}{claim}")
    sys.exit(0 if all(held.values()) else 1)


def compared(straight: Straight, checked: int) -> dict[str, bool]:
    """Train all four straight and compare; prints each difference."""
    started, found = time.monotonic(), list[str]()
    trainings: Sequence[Training] = straight.plan.trainings
    for training in trainings:
        found += straight.differences(training, checked)
    for difference in found:
        print(f"differs: {difference}")
    print(f"{len(trainings)} straight trainings took {time.monotonic() - started:.0f} s")
    claim = f"{len(trainings)} banks and {checked * len(trainings)} finals as the straight way"
    return {claim: not found}


if __name__ == "__main__":
    main()
