"""What runs inside a gang's worker processes: one job after another, until the broker has none.

Rank 0 asks the broker and tells the others; then every rank does its share. An error that would
come back on every try is a failed job, and the gang goes on with the next; anything else is
raised, which Ray Train takes for a lost worker: it starts the workers anew, and the broker
hands the job out again. Knows nothing of sweeps.
"""

import gc
import logging
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist

from service.attention import choice, of_training
from service.facts import nvidia_driver, of_gang, write_facts
from service.states import State
from service.worker_facts import with_attention, worker_facts
from trainer.codec import dump, fingerprint, parse
from trainer.data.shards import Dataset, load_dataset
from trainer.errors import BackendError, DataError, FairwayError, OutOfMemory, Stopped
from trainer.run import grow_trunk, train
from trainer.runtime import distributed
from trainer.runtime.distributed import Ranks
from trainer.runtime.files import locked, write_text
from trainer.specs.task import Departure, TrainTask
from trainer.train.memo import Memo
from trainer.train.state import checkpoints

PROBE_SIZE = {"cpu": 256, "cuda": 4096}  # of the square matrices whose product times a rank
PROBE_TIMES = 5


class UnfitError(FairwayError):
    """What this gang's place lacks for the job; another gang may have it."""


def serve(config: dict[str, Any]) -> None:
    """Do a gang's jobs on this rank; `config`: broker, gang, gpus, cpus_per_worker."""
    torch.set_num_threads(config["cpus_per_worker"])
    cpu = torch.device("cpu")
    device = torch.device("cuda", distributed.local_rank()) if config["gpus"] else cpu
    broker = ray.get_actor(config["broker"], namespace=config["broker"])
    Rank(broker, config["gang"], distributed.current(device)).serve()


class Rank:
    """This process's part in its gang, and what it keeps from one job to the next."""

    def __init__(self, broker: Any, gang: str, ranks: Ranks) -> None:
        self.broker = broker
        self.gang = gang
        self.ranks = ranks
        self.memo = Memo()
        self.checked: set[tuple[str, str]] = set()
        """Datasets and stores that every rank was found to share."""
        self.compiled_for: str | None = None

    def serve(self) -> None:
        """Do jobs until the broker has none."""
        if self._greet() is not None:
            return
        gc.collect()
        gc.freeze()  # what is loaded by now stays; between jobs it need not be looked at again
        while (job := self._share(self._take)) is not None:
            try:
                self._run(job)
            except UnfitError as error:  # on every rank
                if self.ranks.is_first:
                    self._ask("unfit", self.gang, f"{self.gang}: {error}")
                return
            self._tidy()

    def _greet(self) -> str | None:
        """Show what this gang runs on; return why it cannot work, if so."""
        self.facts = of_gang(self._gather(worker_facts(self.ranks.device)))
        prints = self._gather(fingerprint_of(self.ranks.device) | {"skew_s": self._skew_s()})
        return self._share(lambda: self._ask("hello", self.gang, prints))

    def _skew_s(self) -> float:
        before = time.time()
        there = self._ask("clock")
        return round(there - (before + time.time()) / 2, 3)

    def _take(self) -> dict[str, Any] | None:
        return self._ask("take", self.gang)

    def _ask(self, method: str, *words: Any) -> Any:
        return ray.get(getattr(self.broker, method).remote(*words))

    def _share(self, ask: Any) -> Any:
        """Return on every rank what `ask` answers on the first."""
        box = [ask() if self.ranks.is_first else None]
        if self.ranks.world_size > 1:
            dist.broadcast_object_list(box, 0, device=self.ranks.device)
        return box[0]

    def _gather(self, mine: Any) -> list[Any]:
        """Return every rank's value, by rank, on all of them."""
        box = [mine] * self.ranks.world_size
        if self.ranks.world_size > 1:
            dist.all_gather_object(box, mine)
        return box

    def _run(self, job: dict[str, Any]) -> None:
        """Do a job and tell the broker what became of it."""
        folder = Path(job["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        with _logged(folder, self.ranks.rank):
            try:
                self._work(job, folder)
            except (UnfitError, BackendError):
                raise
            except Stopped as stop:  # on every rank after the same step
                self._finish(job, State.STOPPED, stop.reason)
            except (OutOfMemory, torch.OutOfMemoryError, MemoryError) as error:
                # Told first: the other ranks wait for this one and have to be given up.
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                if not isinstance(error, OutOfMemory):
                    reason = f"out of memory: {reason}; lower train.micro_batch_tokens"
                self._ask("finish", self.gang, job["id"], State.FAILED, reason)
                raise
            except FairwayError as error:
                if not self._ask("failed", self.gang, job["id"], self.ranks.rank, str(error)):
                    raise
            except Exception:
                write_text(folder / f"error{self.ranks.rank}.txt", traceback.format_exc())
                raise
            else:
                self._finish(job, State.SUCCEEDED, None)

    def _finish(self, job: dict[str, Any], state: State, reason: str | None) -> None:
        if self.ranks.is_first:
            self._ask("finish", self.gang, job["id"], state, reason)

    def _work(self, job: dict[str, Any], folder: Path) -> None:
        ranks, is_first = self.ranks, self.ranks.is_first
        dataset = self._open(Path(job["data"]), folder)
        task = parse(TrainTask, job["task"], "task")
        self._forget_graphs_of_others(task)
        start = None if job["start"] is None else Path(job["start"])
        steer = Steer(self.broker, job["id"]) if is_first else None
        # Only rank 0 writes. A rank 0 that outlives its killed driver must not write beside us.
        with locked(folder / "writer.lock") if is_first else nullcontext():
            if job["kind"] == "training":
                self._leave_facts(task, [folder], goes_on=bool(checkpoints(folder)))
                train(task, dataset, folder, ranks, start=start, steer=steer, memo=self.memo)
                return
            states = [(parse(Departure, at, "states"), Path(left)) for at, left in job["states"]]
            places = [left for _, left in states]
            self._leave_facts(task, places, goes_on=_is_grown(folder, places))
            grow_trunk(
                task, dataset, states, folder, ranks, start=start, steer=steer, memo=self.memo
            )

    def _leave_facts(self, task: TrainTask, folders: Sequence[Path], *, goes_on: bool) -> None:
        """Write down what this gang computes with, beside what it is to leave."""
        if not self.ranks.is_first:
            return
        asked = of_training(task.model, self.ranks.device.type, task.train)
        facts = with_attention(self.facts, choice(asked, learns=True))
        facts = replace(facts, fused=task.train.fused and self.ranks.device.type == "cuda")
        for folder in folders:
            if not (folder / "result.json").is_file():  # what others left is theirs
                write_facts(folder, facts, goes_on=goes_on)

    def _open(self, data: Path, folder: Path) -> Dataset:
        """Open a job's dataset; UnfitError where the ranks do not share it, or the store."""
        place = str(data), str(folder.parent)
        if place in self.checked:
            return load_dataset(data)
        try:
            dataset = load_dataset(data)
            digest = dataset.digest
        except DataError as error:
            dataset, digest = None, str(error)
        said = self._gather((digest, _leave_mark(folder, self.ranks.rank)))
        unseen = _unseen_marks(folder, self.ranks.world_size)
        self._gather(None)  # every rank has looked
        _mark(folder, self.ranks.rank).unlink(missing_ok=True)
        faults = [f"rank {rank}: {fault}" for rank, (_, fault) in enumerate(said) if fault]
        others = [
            f"{data}: rank 0 finds {said[0][0]}, rank {rank} finds {other}; put the dataset where "
            "every node reads the same files"
            for rank, (other, _) in enumerate(said)
            if other != said[0][0]
        ]
        fault = next(iter([*faults, *others]), digest if dataset is None else None)
        fault = fault or next((text for text in self._gather(unseen) if text), None)
        if fault is not None or dataset is None:
            raise UnfitError(fault)
        self.checked.add(place)
        return dataset

    def _forget_graphs_of_others(self, task: TrainTask) -> None:
        """Drop compiled graphs that this task cannot use; too many would end in a refusal."""
        spec = task.train
        shape = [dump(task.model), spec.seq_len, spec.batch_tokens, spec.micro_batch_tokens]
        kernels = [dump(spec.attention), spec.fused, spec.documents is None]
        key = fingerprint([*shape, *kernels, spec.dtype, spec.compile, spec.qat is None])
        if spec.compile and self.compiled_for not in (None, key):
            torch._dynamo.reset()
        self.compiled_for = key if spec.compile else self.compiled_for

    def _tidy(self) -> None:
        """Give back what the last job held."""
        gc.collect()
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()


class Steer:
    """Asks the broker whether a job goes on (trainer.train.steering.Steer).

    Only a validation waits for its answer. Between them the answer to the last question is
    returned as soon as it is there, so that a step costs no round trip.
    """

    def __init__(self, broker: Any, job_id: str) -> None:
        self.broker = broker
        self.job_id = job_id
        self.asked: Any = None

    def __call__(self, step: int, val_bpb: float | None) -> str | None:
        answer: Any = None
        if val_bpb is not None:
            answer = ray.get(self.broker.steer.remote(self.job_id, step, val_bpb))
            return answer
        if self.asked is not None:
            if not ray.wait([self.asked], timeout=0)[0]:
                return None
            answer = ray.get(self.asked)
        self.asked = self.broker.steer.remote(self.job_id, step, None)
        return answer


def fingerprint_of(device: torch.device) -> dict[str, Any]:
    """What a rank runs on, without names of machines, and how fast it multiplies matrices."""
    is_cuda = device.type == "cuda"
    return {
        "node": ray.get_runtime_context().get_node_id()[:12],
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if is_cuda else "cpu",
        "cuda": torch.version.cuda if is_cuda else None,
        "driver": nvidia_driver() if is_cuda else None,
        "cpus": os.cpu_count(),
        "tflops": probe(device),
    }


def probe(device: torch.device) -> float:
    """Return the TFLOP/s of a matrix product: float32 on a CPU, bfloat16 on a GPU."""
    size = PROBE_SIZE[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    settle = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    best_s = float("inf")
    for _ in range(PROBE_TIMES):  # the first is paid for loading the kernel
        settle()
        started = time.monotonic()
        torch.mm(matrix, matrix)
        settle()
        best_s = min(best_s, time.monotonic() - started)
    return round(2 * size**3 / best_s / 1e12, 4)


def _mark(folder: Path, rank: int) -> Path:
    return folder / f".rank{rank}"


def _leave_mark(folder: Path, rank: int) -> str | None:
    """Say why this rank cannot write into the store, None if it can."""
    try:
        _mark(folder, rank).write_text("")
    except OSError as error:
        return f"{folder}: not writable ({error.strerror}); share the store with every node"
    return None


def _unseen_marks(folder: Path, world_size: int) -> str | None:
    """Say which rank's mark this one cannot see: they then write to different disks."""
    for rank in range(world_size):
        if not _mark(folder, rank).is_file():
            return f"{folder}: what rank {rank} writes is not seen by all; share the store"
    return None


def _is_grown(folder: Path, states: Sequence[Path]) -> bool:
    """Whether a trunk goes on: from a checkpoint, or from one of its states."""
    return bool(checkpoints(folder / "trunk")) or any(
        (state / "result.json").is_file() for state in states
    )


@contextmanager
def _logged(folder: Path, rank: int) -> Iterator[None]:
    """Send the trainer's records to the job's own file for as long as the job lasts."""
    handler = logging.FileHandler(folder / f"rank{rank}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("trainer")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    try:
        yield
    finally:
        logger.handlers.clear()
        handler.close()
