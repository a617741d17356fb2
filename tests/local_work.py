"""What the ranks of a local gang do in tests: a module, because new processes import it by name."""

import os
import time
from pathlib import Path

import torch

from trainer.errors import DataError
from trainer.evaluate.progress import Progress
from trainer.runtime.distributed import Ranks
from trainer.runtime.files import write_text


def add_up(request: int, ranks: Ranks, progress: Progress) -> int:
    """Sum the request over the gang."""
    progress.advance(ranks.rank + 1)
    return int(ranks.sum(torch.tensor(request + ranks.rank)))


def wait_for_ever(request: Path, ranks: Ranks, progress: Progress) -> None:
    """Leave a file by the process's id; the first waits in a collective, the others asleep."""
    write_text(request / f"{ranks.rank}.pid", str(os.getpid()))
    if ranks.rank:
        time.sleep(600)
    ranks.barrier()


def fail(request: str, ranks: Ranks, progress: Progress) -> None:
    """Fail on the last rank, in one way or another, while the first waits for it."""
    if ranks.rank:
        raise DataError("x.npy: broken") if request == "foreseen" else ZeroDivisionError("a bug")
    ranks.barrier()
