"""What the benchmarks of the sweep engine share: a dataset of given shards, a sweep from a mapping,
run here to its end without MLflow, and what its ledger and journals say of its times.

Import this before anything that imports Ray: Ray reads its settings from the environment then.
"""

import json
import lzma
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from killing import holders_of, kill, processes_below

from trainer.codec import to_yaml
from trainer.data.bytecount import ByteTable
from trainer.data.manifest import (
    MANIFEST_FILE,
    TOKENIZER_FILE,
    Manifest,
    Split,
    Tokenizer,
    content_digest,
    write_manifest,
)
from trainer.data.shards import Dataset, describe_shard, load_dataset, open_shard
from trainer.data.tokenizer import open_tokenizer
from trainer.errors import FairwayError, UsageError
from trainer.protocol import BOS_ID
from trainer.runtime.environment import prepare_for_ray
from trainer.runtime.files import sha256_file, write_bytes

prepare_for_ray()

from service.cluster import Where  # noqa: E402
from service.identity import inputs_of  # noqa: E402
from service.ledger import SweepView, read  # noqa: E402
from service.machine import look  # noqa: E402
from service.paths import Paths  # noqa: E402
from service.plan import Plan, make_plan  # noqa: E402
from service.preflight import checks, question  # noqa: E402
from service.search import Setting, Site, run_sweep  # noqa: E402
from service.sweep import Sweep, load_sweep  # noqa: E402
from service.talk import Talk  # noqa: E402
from service.trials import REAL, Work  # noqa: E402


@dataclass(frozen=True, slots=True)
class Ran:
    """A sweep that was run: its view, its events in order, and where its stages lie."""

    view: SweepView
    events: list[dict[str, Any]]
    paths: Paths
    seconds: float
    warnings: list[str]
    """What preflight found that is no reason not to run."""

    def first(self, event: str) -> dict[str, Any]:
        """The first event of a kind; FairwayError if there is none."""
        found = self.all(event)
        if not found:
            raise FairwayError(f"the ledger has no {event}: was the stage found, not computed?")
        return found[0]

    def all(self, event: str) -> list[dict[str, Any]]:
        """All events of a kind, in order."""
        return [each for each in self.events if each["event"] == event]

    def journal(self, training: str) -> list[dict[str, float]]:
        """What a training wrote down on its way."""
        return journal(self.paths.store / "trainings" / training)


def run(
    spec: Mapping[str, Any],
    home: Path,
    dataset: Dataset,
    where: Where,
    work: Work = REAL,
) -> Ran:
    """Check a sweep and run it, by default with the real work; raises as its two parts do."""
    paths = Paths(home)
    home.mkdir(parents=True, exist_ok=True)
    file = home / f"{spec['name']}.yaml"
    file.write_text(to_yaml({"data": {"name": dataset.name}, **spec}), encoding="utf-8")
    sweep, inputs = load_sweep(file), inputs_of(dataset)
    plan = make_plan(sweep, inputs, str(file))
    site = Site(paths, dataset, where, work)
    found = preflight(sweep, paths, dataset, plan) if where.address is None else []
    started = time.monotonic()
    view = run_sweep(Setting(sweep, plan, inputs, str(file), site), Talk())
    seconds = time.monotonic() - started
    return Ran(view, list(read(paths.sweep(plan.sweep_id).ledger)), paths, seconds, found)


def preflight(sweep: Sweep, paths: Paths, dataset: Dataset, plan: Plan) -> list[str]:
    """Check this machine as `doctor` does; return the warnings, UsageError where it cannot work.

    Versions that are missing only warn: a bare machine runs a checkout, and nothing is shown there.
    """
    here = look(paths.store, question(sweep))
    found = checks(sweep, paths, dataset, plan, here, (here,))
    failed = [each.line() for each in found if each.verdict == "fail" and each.name != "versions"]
    if failed:
        raise UsageError("; ".join(failed))
    return [each.line() for each in found if each.verdict != "ok"]


def journal(folder: Path) -> list[dict[str, float]]:
    """The whole lines of a training's metrics.jsonl; none before it begins."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def steps_of(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    """The lines that tell of training steps, not of validations alone."""
    return [line for line in lines if "train/loss" in line]


def step_seconds(lines: list[dict[str, float]]) -> float:
    """The median pace between two lines, the first stretch left out: clocks still speed up."""
    paces = [line["train/step_s"] for line in steps_of(lines) if "train/step_s" in line]
    return median(paces[1:] or paces)


def first_step_at(lines: list[dict[str, float]]) -> float:
    """Unix seconds at which the first step began: up to the first line all time was training's."""
    first = steps_of(lines)[0]
    return first["at"] - first["train/clock_s"]


def times_of(ran: Ran, training: str) -> dict[str, Any]:
    """The times of a sweep of one training, in seconds, as its ledger and its journal have them."""
    started, gang = ran.first("training_started")["at"], ran.first("gang_started")["at"]
    ended = ran.first("training_finished")["at"]
    lines = ran.journal(training)
    last_step = steps_of(lines)[-1]["at"]
    scored = [event["at"] for event in ran.all("final_scored")]
    paid = [event["occupied_s"] for event in ran.all("final_scored")]
    return {
        "ray_start_s": round(started - ran.first("sweep_started")["at"], 2),
        "request_to_gang_s": round(gang - started, 2),
        "request_to_first_step_s": round(first_step_at(lines) - started, 2),
        "last_step_to_first_score_s": round(min(scored) - last_step, 2),
        "all_finals_s": round(max(scored) - ended, 2),
        "mean_final_s": round(sum(paid) / len(paid), 2),
        "sweep_s": round(ran.seconds, 2),
    }


def dataset_of_shards(
    folder: Path, name: str, train: list[Path], val: list[Path], tokenizer: Path
) -> Dataset:
    """Make a dataset of shard files, bare or .xz, as they are; the one at `folder` if it is there.

    Nothing is held out: no finals can be ranked on it.
    """
    if (folder / MANIFEST_FILE).is_file():
        return load_dataset(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / TOKENIZER_FILE
    model.write_bytes(tokenizer.read_bytes())
    table = ByteTable.load(model)
    splits = {
        split: _split(folder, f"{name}_{split}", files, table)
        for split, files in (("train", train), ("holdout", []), ("val", val))
    }
    entry = Tokenizer(sha256=sha256_file(model), vocab_size=open_tokenizer(model).vocab_size())
    digest = content_digest(entry, splits)  # type: ignore[arg-type]
    manifest = Manifest(name=name, tokenizer=entry, splits=splits, settings={}, digest=digest)  # type: ignore[arg-type]
    write_manifest(folder, manifest)
    return load_dataset(folder)


def _split(folder: Path, stem: str, sources: list[Path], table: ByteTable) -> Split:
    shards, documents, num_bytes = [], 0, 0
    for number, source in enumerate(sources):
        path = folder / f"{stem}_{number:06}.bin"
        found = source.read_bytes()
        write_bytes(path, lzma.decompress(found) if source.suffix == ".xz" else found)
        tokens = np.asarray(open_shard(path))
        shards.append(describe_shard(path))
        documents += int((tokens == BOS_ID).sum())
        num_bytes += int(table.count(tokens[:-1], tokens[1:]).sum())
    total = sum(shard.tokens for shard in shards)
    return Split(shards=tuple(shards), tokens=total, documents=documents, bytes=num_bytes)


class Killer:
    """Kills a rank of the one training that runs below a folder, once it has a checkpoint."""

    def __init__(self, trainings: Path, rank: int, after_step: int) -> None:
        self.trainings = trainings
        self.rank = rank
        self.after_step = after_step
        self.before = set(trainings.glob("*"))
        self.killed_at: float | None = None
        self.known_step = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Killer":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while self.killed_at is None and not self._stop.wait(0.02):
            for folder in set(self.trainings.glob("*")) - self.before:
                if folder.is_dir() and any(folder.glob("checkpoint/*/index.json")):
                    self._kill(folder)

    def _kill(self, folder: Path) -> None:
        lines = steps_of(journal(folder))
        # Half way to the next checkpoint, so that some steps have to be done again.
        if not lines or lines[-1]["step"] < 1.5 * self.after_step:
            return
        ranks = holders_of(folder / f"rank{self.rank}.log", processes_below(os.getpid()))
        if not ranks or not kill(ranks[0]):
            return
        self.killed_at = time.time()
        self.known_step = int(steps_of(journal(folder))[-1]["step"])

    def told(self, lines: list[dict[str, float]]) -> dict[str, Any]:
        """What the journal says of the time after the kill."""
        if self.killed_at is None:
            raise FairwayError("the training was over before a worker could be killed")
        after = [line for line in steps_of(lines) if line["at"] > self.killed_at]
        new = next((line for line in after if line["step"] > self.known_step), None)
        if new is None:
            raise FairwayError(f"no step came after {self.known_step}, where a worker was killed")
        replayed = self.known_step % self.after_step
        return {
            "killed_at_step": self.known_step,
            "steps_done_again": replayed,
            "kill_to_new_step_s": round(new["at"] - self.killed_at, 2),
            # Steps that were written down before are not written again: taken off at their pace.
            "kill_to_next_step_s": round(
                new["at"] - self.killed_at - replayed * step_seconds(lines), 2
            ),
        }


class PeakMemory:
    """The most memory that was seen in use while a block lasted, looked at every two seconds.

    `gib`: by GPU index as NVML counts it, contexts included; on a CPU the largest process below.
    """

    PERIOD_S = 2.0

    def __init__(self, device: str) -> None:
        self.gib: dict[str, float] = {}
        self._look = self._look_at_gpus if device == "cuda" else self._look_at_processes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self.PERIOD_S):
            for name, gib in self._look().items():
                self.gib[name] = round(max(gib, self.gib.get(name, 0.0)), 2)

    def _look_at_gpus(self) -> dict[str, float]:
        import pynvml  # not torch: that would put a context of our own on every GPU

        pynvml.nvmlInit()
        used = {}
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            used[f"gpu{index}"] = pynvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30
        return used

    def _look_at_processes(self) -> dict[str, float]:
        largest = 0
        for pid in processes_below(os.getpid()):
            try:
                largest = max(largest, int(Path(f"/proc/{pid}/statm").read_text().split()[1]))
            except OSError:
                continue
        return {"largest process": largest * os.sysconf("SC_PAGE_SIZE") / 2**30}
