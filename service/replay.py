"""Run a recorded final again and say whether it came out the same.

`prepare` holds the sheet against the data, the code and the machine, and refuses before anything
is spent; `run` trains and finalizes in a store of its own, with as many processes as the gang had
and without Ray; `compare` holds what came out against what was recorded. On a CPU the artifact's
bytes and its bpb have to be equal. A GPU's sums, and a training that its clock ends, are never
twice the same: there the bpb has to lie within the noise of seeds.
"""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from scipy.special import ndtri, stdtrit

from service.attention import choice, of_evaluation, of_training
from service.facts import dirty_diff, driver_facts, write_facts
from service.local_ranks import run_ranks
from service.paths import Paths
from service.replay_checks import (
    Difference,
    Wanted,
    check_code,
    check_data,
    check_driver,
    check_noise,
    check_sheet,
    check_workers,
    find_data,
    missing_facts,
    paths_of,
    require_allowed,
    require_data,
    wanted_of,
)
from service.sheet import Noise, Sheet, noise_of
from service.store import Store
from service.talk import Talk
from service.tasks import run_final
from service.worker_facts import with_attention, worker_facts
from trainer.codec import dump, parse
from trainer.data.prepare import EMBEDDED_NAME, prepare_embedded
from trainer.data.shards import load_dataset
from trainer.errors import UsageError
from trainer.evaluate.progress import Progress, Silent
from trainer.finalize.code import code_digest
from trainer.results import FinalResult, TrainResult
from trainer.run import train
from trainer.runtime.distributed import Ranks
from trainer.specs.task import TrainTask

# Techniques 1.8: over seeds a score's standard deviation is 0.0002 to 0.0017 bpb, typically
# 0.0005 to 0.0009; taken where nobody has measured the sweep's own.
DEFAULT_SD_BPB = 0.0009


@dataclass(frozen=True, slots=True)
class Spread:
    """How far seeds alone move a score, and who says so: a standard deviation in bpb, with the
    degrees of freedom that it was measured with, None where it is taken as it is."""

    sd_bpb: float = DEFAULT_SD_BPB
    df: int | None = None
    source: str = "techniques 1.8"

    @property
    def limit_bpb(self) -> float:
        """How far apart 95 of 100 pairs of seeds are at most. The fewer seeds the deviation was
        measured with, the wider: Student's t, as in service.verdicts."""
        quantile = float(ndtri(0.975) if self.df is None else stdtrit(self.df, 0.975))
        return quantile * sqrt(2) * self.sd_bpb


@dataclass(frozen=True, slots=True)
class Prepared:
    """A replay that may run. allowed: differences that count and were accepted; notes: the rest."""

    sheet: Sheet
    wanted: Wanted
    data: Path
    device: str
    num_ranks: int
    noise: Spread
    allowed: tuple[Difference, ...]
    notes: tuple[Difference, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a replay came to: its results, or why its bank was quarantined."""

    trained: TrainResult
    final: FinalResult | None
    quarantined: str | None = None


@dataclass(frozen=True, slots=True)
class _Job:
    """What every rank of the replay's gang is told."""

    store: str
    training: str
    data: str
    task: dict[str, Any]
    threads: int
    final: dict[str, Any]


def prepare(
    paths: Paths,
    sheet: Sheet,
    data: Path | None,
    values: Sequence[tuple[str, Any]] = (),
    allowed: Collection[str] = (),
) -> Prepared:
    """Check everything that a replay follows from; UsageError for a difference that counts and is
    not among the allowed names. `data` is its folder, where it is not to be found in the home."""
    wanted = wanted_of(sheet, values)
    train_spec = wanted.train_task.train
    if (train_spec.batch_tokens // train_spec.seq_len) % sheet.world_size:
        raise UsageError(
            f"{sheet.final}: world_size={sheet.world_size} workers do not share "
            f"train.batch_tokens={train_spec.batch_tokens} evenly; no such gang has trained it"
        )
    folder = _data_folder(paths, sheet, data)
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = "cuda" if sheet.device == "cuda" and num_gpus else "cpu"
    here = replace(worker_facts(torch.device(device)), threads=sheet.threads)  # as `run` sets them
    trains, scores = (with_attention(here, name) for name in _kernels(wanted, device))
    measured = Noise() if sheet.sweep is None else noise_of(paths, sheet.sweep)
    found = [
        *wanted.differences,
        *check_sheet(sheet),
        *check_code(sheet, code_digest()),
        *check_data(sheet, folder),
        *check_workers(sheet, trains, scores, num_gpus),
        *check_driver(sheet, driver_facts(dirty_diff())),
        *([] if is_exact(sheet) or measured.sd_bpb is not None else check_noise(sheet)),
        *missing_facts(sheet),
    ]
    require_allowed(sheet.final, found, allowed, paths_of(sheet, values))
    num_ranks = min(sheet.world_size, num_gpus) if device == "cuda" else sheet.world_size
    return Prepared(
        sheet=sheet,
        wanted=wanted,
        data=folder,
        device=device,
        num_ranks=num_ranks,
        noise=_spread(measured, sheet.noise),
        allowed=tuple(each for each in found if each.counts),
        notes=tuple(each for each in found if not each.counts),
    )


def _spread(measured: Noise, told: Noise) -> Spread:
    """What this home has measured, else what the sheet tells, else what is published."""
    for noise, source in ((measured, "the sweep's seeds"), (told, "the sheet")):
        if noise.sd_bpb is not None:
            return Spread(noise.sd_bpb, noise.df, source)
    return Spread()


def _data_folder(paths: Paths, sheet: Sheet, data: Path | None) -> Path:
    home_data = paths.home / "data"
    if data is not None:
        return data
    if sheet.data.name == EMBEDDED_NAME and find_data(sheet, home_data) is None:
        return prepare_embedded(paths.data(EMBEDDED_NAME)).folder
    return require_data(sheet, home_data)


def _kernels(wanted: Wanted, device: str) -> tuple[str, str]:
    """The attention kernels of training and evaluation here; UsageError, naming its field, for one
    that is not to be had."""
    task, evaluate = wanted.train_task, wanted.final_task.evaluate
    scoring = of_evaluation(task.model, device, task.train.dtype, evaluate)
    return (
        choice(of_training(task.model, device, task.train), learns=True),
        choice(scoring, learns=False),
    )


def run(prepared: Prepared, store: Path, talk: Talk) -> Outcome:
    """Train from step 0, check parity, make the artifact and score it, in a new store."""
    sheet, on_cpu = prepared.sheet, prepared.device == "cpu"
    task = prepared.wanted.train_task
    job = _Job(
        store=str(store.resolve()),
        training=sheet.training,
        data=str(prepared.data.resolve()),
        task=dump(task),
        threads=sheet.threads,
        final={
            "store": str(store.resolve()),
            "data": str(prepared.data.resolve()),
            "task": dump(prepared.wanted.final_task),
            "training": sheet.training,
            "final": sheet.final,
            "artifact": sheet.final,
            "hessians": sheet.final,
            "cpus": sheet.threads,
            "device": prepared.device,
        },
    )
    steps = task.train.iterations
    talk.say("training", workers=prepared.num_ranks, steps=steps, device=prepared.device)
    run_ranks(_train, job, prepared.num_ranks, Silent(), on_cpu=on_cpu)
    trained = parse(
        TrainResult, Store(store).find("trainings", sheet.training), "the replayed training"
    )
    talk.say("trained", bpb=trained.parity_bpb, clock_s=round(trained.train_clock_s, 1))
    # In a process of its own, as parity asks.
    done = run_ranks(_finalize, job, 1, Silent(), on_cpu=on_cpu)
    if "quarantined" in done:
        return Outcome(trained, None, done["quarantined"])
    final = parse(FinalResult, done["result"], "the replayed final")
    talk.say("scored", bpb=final.score.val_bpb, bytes=final.artifact_bytes)
    return Outcome(trained, final)


def _train(job: _Job, ranks: Ranks, progress: Progress) -> None:
    # torch's notice on a setting of DistributedDataParallel, which every rank would print.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    torch.set_num_threads(job.threads)
    folder = Store(Path(job.store)).folder("trainings", job.training)
    if ranks.is_first:
        write_facts(folder, worker_facts(ranks.device))
    train(parse(TrainTask, job.task, "task"), load_dataset(Path(job.data)), folder, ranks)


def _finalize(job: _Job, ranks: Ranks, progress: Progress) -> dict[str, Any]:
    return run_final(job.final)


def is_exact(sheet: Sheet) -> bool:
    """Whether the same bytes must come out: of CPUs, and of a training that no clock ended and that
    a trunk, if it came from one, changed in no bit."""
    train = sheet.train_task.train
    if sheet.device != "cpu" or train.schedule.basis != "steps":
        return False
    if train.max_clock_s is not None and sheet.result.steps < train.iterations:
        return False
    return sheet.branch is None or not (train.compile or train.max_clock_s is not None)


def compare(prepared: Prepared, outcome: Outcome) -> dict[str, Any]:
    """What came out beside what was recorded, as plain data; `same` is the verdict, `verdict` says
    it in words."""
    sheet, exact = prepared.sheet, is_exact(prepared.sheet)
    recorded, replayed = _recorded(sheet), _replayed(outcome)
    limit = prepared.noise.limit_bpb
    document: dict[str, Any] = {
        "final": sheet.final,
        "training": sheet.training,
        "sweep": sheet.sweep,
        "criterion": "the same bytes" if exact else f"within {limit:.5f} bpb",
        "noise": asdict(prepared.noise),
        "recorded": recorded,
        "replayed": replayed,
        "allowed": [asdict(each) for each in prepared.allowed],
        "notes": [asdict(each) for each in prepared.notes],
    }
    if outcome.final is None:
        return {"same": False, "verdict": outcome.quarantined, **document}
    off = abs(replayed["val_bpb"] - recorded["val_bpb"])
    differing = [name for name, value in recorded.items() if replayed[name] != value]
    if exact:
        wrong = [name for name in differing if name not in ("steps", "code_bytes")]
        words = "the same bytes and the same bpb"
    else:
        wrong = ["val_bpb"] if off > limit else []
        words = f"within the noise of seeds: {off:.6f} bpb apart, {limit:.6f} are allowed"
    if wrong:
        told = (f"{name} {recorded[name]} → {replayed[name]}" for name in wrong)
        words = f"not the same: {'; '.join(told)}; {_suspects(prepared)}"
    return {"same": not wrong, "verdict": words, **document}


def _suspects(prepared: Prepared) -> str:
    """What may be to blame: what was allowed, else what is only noted."""
    found = prepared.allowed or prepared.notes
    if not found:
        return "no recorded fact differs here"
    return "what differs here: " + "; ".join(map(str, found))


def _recorded(sheet: Sheet) -> dict[str, Any]:
    of = sheet.result
    return {
        "weights_sha256": of.weights_sha256,
        "artifact_bytes": of.artifact_bytes,
        "code_bytes": of.code_bytes,
        "val_bpb": of.val_bpb,
        "steps": of.steps,
    }


def _replayed(outcome: Outcome) -> dict[str, Any]:
    final = outcome.final
    return {
        "weights_sha256": final and final.weights_sha256,
        "artifact_bytes": final and final.artifact_bytes,
        "code_bytes": final and final.code_bytes,
        "val_bpb": final and final.score.val_bpb,
        "steps": outcome.trained.steps,
    }
