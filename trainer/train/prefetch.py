"""Batches on the device, the next one read while the device is at work on this one."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import torch
from torch import Tensor

Read = Callable[[int, np.ndarray], object]


class Prefetcher:
    """Hands out the rows of any step. While one is worked on, a thread reads those of the next.

    The thread only reads, into host memory that the device copies from on its own; whoever takes
    steps in another order gets the same rows, later. `close` ends the thread.
    """

    def __init__(self, read: Read, shape: tuple[int, int], device: torch.device) -> None:
        """`read(step, out)` fills an int64 array of `shape` with a step's rows."""
        self._read = read
        self._device = device
        on_cuda = device.type == "cuda"
        # Two: one is read into while the device copies from the other.
        self._buffers = [torch.empty(shape, dtype=torch.int64, pin_memory=on_cuda) for _ in "ab"]
        self._copied = [torch.cuda.Event() for _ in "ab"] if on_cuda else []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: tuple[int, Future[object]] | None = None
        self._slot = 0

    def take(self, step: int) -> Tensor:
        """Return a step's rows on the device, and have the next step's read."""
        self._await(step)
        source = self._buffers[self._slot]
        rows = torch.empty_like(source, device=self._device).copy_(source, non_blocking=True)
        if self._copied:
            self._copied[self._slot].record(torch.cuda.current_stream(self._device))
        self._slot = 1 - self._slot
        self._begin(step + 1)
        return rows

    def close(self) -> None:
        """End the thread, once it has read what it is at."""
        self._thread.shutdown(cancel_futures=True)

    def _await(self, step: int) -> None:
        """Leave a step's rows in the current buffer."""
        if self._ahead is None or self._ahead[0] != step:
            if self._ahead is not None:
                wait([self._ahead[1]])  # what it met is none of this step's business
            self._begin(step)
        assert self._ahead is not None  # just begun
        _, future = self._ahead
        self._ahead = None
        future.result()

    def _begin(self, step: int) -> None:
        """Have a step's rows read into the current buffer."""
        if self._copied:
            self._copied[self._slot].synchronize()  # of two steps ago: over, as a rule
        out = self._buffers[self._slot].numpy()
        self._ahead = step, self._thread.submit(self._read, step, out)
