"""Whether the fast kernels train to the same place: pairs of short trainings, with and without.

    python benchmarks/kernel_noise.py --data FOLDER --out DIR [--recipe pr414] [--steps 200] \
        [--seeds 1337,1338,1339] [--orders sequential,shuffled] [--for-s 500] [-S path=value]

`plain` is the recipe as it is shipped and `fast` the same with the fast paths on, both `--steps`
steps without a clock. A pair has one seed and one order of the text, so that both start from the
same weights and read the same tokens; a seed decides the weights and, where shuffled, the order.
What is compared is the loss of the last step, and bits per byte of the raw weights at its end.

Each difference is fast less plain. It counts as within noise where its mean is no larger than the
deviation of plain over the seeds of an order; beside it stands the 95 % interval of the mean by
Student's t over the pairs. A training that lies finished in DIR is not run again, and none is begun
after --for-s seconds: call it again to go on. Rows are also in DIR/noise.json. Exits 1 where a
figure lies outside of the noise.
"""

import argparse
import gc
import json
import time
from collections.abc import Iterator, Mapping
from itertools import product
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from gpu import fast_settings

from trainer.artifacts import load_training
from trainer.codec import parse, parse_assignment, with_values
from trainer.data.shards import Dataset, load_dataset
from trainer.run import is_trained, train
from trainer.runtime.distributed import Ranks
from trainer.runtime.files import write_json
from trainer.specs.recipe import Recipe
from trainer.specs.task import train_task
from tune_spaces.catalogue import load_recipe

FIGURES = {"train_loss": "train loss, nats", "val_bpb": "val, bits per byte"}
# Two-sided 95 % quantiles of Student's t by degrees of freedom; the normal one beyond.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
T_95_BEYOND = 2.16

Rows = dict[tuple[str, int, str], dict[str, float]]
"""By order, seed and column."""


def main() -> int:
    """Train what is missing, print every run and what the pairs say."""
    told = _parsed()
    device, dataset = torch.device(told.device), load_dataset(told.data)
    until = time.monotonic() + told.for_s
    rows: Rows = {}
    missing = 0
    for order, seed, column in product(told.orders, told.seeds, ("plain", "fast")):
        folder = told.out / f"{order}-{seed}-{column}"
        recipe = _recipe(told, order, seed, column, device)
        row = _run(recipe, dataset, folder, Ranks(device=device), until)
        if row is None:
            missing += 1
            continue
        rows[order, seed, column] = row
        told_of = ", ".join(f"{name} {row[key]:.5f}" for key, name in FIGURES.items())
        print(f"{order:12}seed {seed:<8}{column:8}{told_of}, {row['step_ms']:.1f} ms", flush=True)
    verdicts = {key: compare(rows, key) for key in FIGURES}
    for key, verdict in verdicts.items():
        print(_told(FIGURES[key], verdict))
    if missing:
        print(f"{missing} trainings are still to be run: call it again")
    named = [{"order": o, "seed": s, "column": c, **row} for (o, s, c), row in sorted(rows.items())]
    write_json(told.out / "noise.json", {"rows": named, "verdicts": verdicts, "missing": missing})
    return 0 if all(verdict.get("within_noise", True) for verdict in verdicts.values()) else 1


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="prepared folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", default="pr414")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--seeds", type=lambda text: [int(x) for x in text.split(",")], default=[1337, 1338, 1339]
    )
    parser.add_argument("--orders", type=lambda text: text.split(","), default=["sequential"])
    parser.add_argument("--for-s", type=float, default=float("inf"))
    parser.add_argument(
        "--device", default="cuda:0" if torch.cuda.is_available() else "cpu", help="cuda:0 or cpu"
    )
    parser.add_argument("-S", dest="set", action="append", default=[], metavar="path=value")
    return parser.parse_args()


def _recipe(
    told: argparse.Namespace, order: str, seed: int, column: str, device: torch.device
) -> Recipe:
    """One training of the comparison; its warmdown is the last quarter of its steps."""
    data = load_recipe(told.recipe, "benchmark")
    if column == "fast":
        data = with_values(data, fast_settings(device).items())
    settings: Mapping[str, Any] = {
        "train.iterations": told.steps,
        "train.max_clock_s": None,
        "train.warmup_steps": 2,  # so that milliseconds are without compilation
        "train.seed": seed,
        "train.order": order,
        "train.schedule": {
            "basis": "steps",
            "warmdown_iters": told.steps // 4,
            "warmdown_fraction": None,
        },
        "observe.log_every": max(told.steps // 10, 1),
        "observe.validate_every": None,
        "observe.checkpoint_every": None,
    }
    data = with_values(data, settings.items())
    data = with_values(data, [parse_assignment(text) for text in told.set])
    return parse(Recipe, data, f"{told.recipe}, {column}")


def _run(
    recipe: Recipe, dataset: Dataset, folder: Path, ranks: Ranks, until: float
) -> dict[str, float] | None:
    """Return a training's figures, running it first if need be; None where no time is left."""
    task = train_task(recipe)
    if not is_trained(task, dataset, folder, ranks):
        if time.monotonic() > until:
            return None
        train(task, dataset, folder, ranks)
        torch._dynamo.reset()  # the next model is another one: its graphs are its own
        gc.collect()
    _, result = load_training(folder)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    scores = [json.loads(line)["val/bpb"] for line in lines if "val/bpb" in line]
    return {
        "train_loss": result.final_train_loss,
        "val_bpb": scores[-1],
        "step_ms": 1e3 * result.train_clock_s / result.steps,
    }


def compare(rows: Rows, key: str) -> dict[str, Any]:
    """Say how a figure's pairs differ, beside plain's deviation over the seeds of an order.

    Empty where there is no pair; the deviation and the verdict need two seeds of one order.
    """
    pairs = sorted((o, s) for o, s, c in rows if c == "plain" and (o, s, "fast") in rows)
    gaps = [rows[o, s, "fast"][key] - rows[o, s, "plain"][key] for o, s in pairs]
    if not gaps:
        return {}
    found: dict[str, Any] = {"pairs": len(gaps), "mean": mean(gaps)}
    if len(gaps) > 1:
        degrees = len(gaps) - 1
        t = T_95[degrees - 1] if degrees <= len(T_95) else T_95_BEYOND
        half = t * stdev(gaps) / sqrt(len(gaps))
        found["interval"] = [found["mean"] - half, found["mean"] + half]
    groups = list(_by_order(rows, key))
    freedom = sum(len(group) - 1 for group in groups)
    if freedom:
        squares = sum((len(group) - 1) * stdev(group) ** 2 for group in groups if len(group) > 1)
        found["seed_deviation"] = sqrt(squares / freedom)
        found["within_noise"] = abs(found["mean"]) <= found["seed_deviation"]
    return found


def _by_order(rows: Rows, key: str) -> Iterator[list[float]]:
    """A figure of plain over the seeds, for each order."""
    for order in sorted({order for order, _, _ in rows}):
        group = [
            row[key] for (o, _, column), row in rows.items() if (o, column) == (order, "plain")
        ]
        if group:
            yield group


def _told(name: str, verdict: Mapping[str, Any]) -> str:
    """A figure's comparison in a line."""
    if not verdict:
        return f"{name}: no pair is whole yet"
    line = f"{name}: fast - plain {verdict['mean']:+.5f} over {verdict['pairs']} pairs"
    if "interval" in verdict:
        low, high = verdict["interval"]
        line += f", 95 % [{low:+.5f}, {high:+.5f}]"
    if "within_noise" not in verdict:
        return f"{line}; give a second seed to know the noise"
    word = "within" if verdict["within_noise"] else "OUTSIDE"
    return f"{line}; seeds deviate by {verdict['seed_deviation']:.5f}: {word} seed noise"


if __name__ == "__main__":
    raise SystemExit(main())
