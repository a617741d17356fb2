"""Ranks and the few collectives the trainer needs. With one rank they do nothing."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from trainer.errors import FairwayError, TrainingError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place in its gang, and its device."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (a value, never changed)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over the gang, in place, and return it."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def max(self, value: float) -> float:
        """Return the largest value that any rank holds."""
        if self.world_size == 1:
            return value
        box = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return float(box)

    def together(self, work: Callable[[], T]) -> T:
        """Do local work that may fail; where it fails on one rank, all raise.

        A rank that left alone would keep the others waiting in their next collective.
        """
        result, failure = None, None
        try:
            result = work()
        except FairwayError as error:
            failure = error
        if self.max(float(failure is not None)):
            raise failure or TrainingError("another worker of the gang failed; see its log")
        return result  # type: ignore[return-value]  # no failure: the work returned

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.max(0.0)


def current(device: torch.device | None = None) -> Ranks:
    """Describe the process group that is already up, or a gang of one."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks(device=device or best_device(0))
    rank = dist.get_rank()
    return Ranks(rank, dist.get_world_size(), device or best_device(local_rank()))


@contextmanager
def from_torchrun() -> Iterator[Ranks]:
    """Join the gang that torchrun started, if it did, and leave it at the end."""
    if "RANK" not in os.environ:
        yield current()
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank())
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield current()
    finally:
        # What still holds the group would keep its threads: one that Python's end meets at work
        # takes the process with it.
        gc.collect()
        dist.destroy_process_group()


def best_device(index: int) -> torch.device:
    """This rank's CUDA device where there is one, else the CPU."""
    return torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")


def local_rank() -> int:
    """This process's rank on its machine, as torchrun and Ray Train tell it."""
    return int(os.environ.get("LOCAL_RANK", "0"))
