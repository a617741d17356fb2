"""Graphs that torch.compile builds where none may be built: on the clock.

Read from torch's own counters, torch._dynamo.utils as of torch 2.11 and 2.13.
"""

import torch

from trainer.errors import TrainingError

MOST_GRAPHS = 64
"""Of one forward: a process that does one training after another builds some for each."""


def graphs_built() -> int:
    """Return how many graphs torch has built in this process so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def refuse_graphs_built_since(built: int, step: int, warmup_steps: int) -> None:
    """TrainingError if a graph was built since `built` was counted, in step `step`.

    It says why, where torch tells: its time was charged to the training clock. A rank that raises
    it alone ends the others by whoever started them, as any rank that dies.
    """
    more = graphs_built() - built
    if more <= 0:
        return
    raise TrainingError(
        f"train.compile: {more} graph{'s were' if more > 1 else ' was'} built on the training "
        f"clock, at step {step} ({_why(more)}); raise train.warmup_steps, now {warmup_steps}, "
        "or set train.compile=false"
    )


def _why(count: int) -> str:
    """What torch says of the last graphs it built: of each forward its name and the reason."""
    built = torch._dynamo.utils.get_compilation_metrics()
    forwards = [metrics for metrics in built if metrics.is_forward]
    reasons = [
        f"{metrics.co_name}: {' '.join((metrics.recompile_reason or 'no reason told').split())}"
        for metrics in forwards[-count:]
    ]
    return "; ".join(reasons) or "torch tells no reason"
