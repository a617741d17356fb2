"""A training that does not fit says so, with what it peaked at and what to lower."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainer.errors import OutOfMemory
from trainer.runtime.distributed import Ranks
from trainer.specs.train import TrainSpec

_GIB = 1 << 30
# How torch's allocators, CUDA and NCCL put it.
_SIGNS = ("out of memory", "can't allocate memory")


@contextmanager
def memory_watched(spec: TrainSpec, ranks: Ranks) -> Iterator[None]:
    """Raise OutOfMemory where memory runs out inside. The other ranks are not told."""
    if ranks.device.type == "cuda" and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats(ranks.device)
    try:
        yield
        return
    except (MemoryError, RuntimeError) as error:
        said = str(error).partition("\n")[0]
        if not isinstance(error, MemoryError) and not any(s in said.lower() for s in _SIGNS):
            raise
    # Outside of the except: the frames that hold the tensors are free to go.
    local = spec.batch_tokens // ranks.world_size
    raise OutOfMemory(
        f"rank {ranks.rank} ran out of memory ({_peak(ranks.device)}): {said}; lower "
        f"train.micro_batch_tokens, now {spec.micro_batch_tokens or local}"
    )


def _peak(device: torch.device) -> str:
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return (
            f"peak {torch.cuda.max_memory_allocated(device) / _GIB:.2f} GiB allocated, "
            f"{torch.cuda.max_memory_reserved(device) / _GIB:.2f} GiB reserved, of "
            f"{total / _GIB:.2f} GiB on {torch.cuda.get_device_name(device)}"
        )
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"peak {peak_kib * 1024 / _GIB:.2f} GiB of the process"
