"""A whole update as one launch: the plain code, recorded once as a CUDA graph and replayed.

An update launches hundreds of small kernels, which takes a CPU longer than it takes the device to
run them. Source: torch's notes on CUDA graphs; a replay runs the same kernels on the same
addresses, so what varies from step to step is copied into fixed tensors first.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_RATES = ("lr", "momentum")  # what of a group varies from step to step


class CapturedUpdate:
    """Runs and records `apply` at its first call and replays it at all later ones.

    Whatever `apply` moves, weights and the states of `optimizers` alike, must stay the same
    tensors; what it is not told by a group's lr and momentum stays what it was when recorded.
    Where other parameters than then have a gradient, it is recorded anew.
    """

    def __init__(
        self,
        apply: Callable[[], None],
        parameters: Sequence[nn.Parameter],
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> None:
        self._apply = apply
        self._parameters = parameters
        self._optimizers = optimizers
        self._graph: torch.cuda.CUDAGraph | None = None
        self._given: list[int] = []
        self._gradients: list[Tensor] = []
        device = parameters[0].device
        self._rates = [torch.zeros((), device=device) for _ in self._varying()]

    def __call__(self) -> None:
        """Move the weights by the gradients that there are."""
        given = [i for i, p in enumerate(self._parameters) if p.grad is not None]
        if given != self._given:
            self._graph, self._given = None, given
            self._gradients = [torch.empty_like(self._parameters[i]) for i in given]
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        torch._foreach_copy_(self._gradients, gradients)
        for rate, (group, key) in zip(self._rates, self._varying(), strict=True):
            rate.fill_(group[key])  # unlike a copy from the host it waits for nothing
        if self._graph is not None:
            self._graph.replay()
            return
        with self._in_place():
            # Makes the optimizers' states and loads the kernels. It reads what a replay reads, so
            # that a training that begins here gets the bits of one that goes on.
            self._apply()
            self._graph = self._record()

    def _record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        groups = [group for group in self._groups() if "capturable" in group]
        try:
            for group in groups:
                group["capturable"] = True
            # Only what this thread does is recorded and restricted: another reads batches.
            device = self._rates[0].device
            with (
                torch.cuda.device(device),
                # A stream of this device: torch's own is of the one that recorded first.
                torch.cuda.graph(
                    graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"
                ),
            ):
                self._apply()
        finally:
            for group in groups:
                group["capturable"] = False  # as it is in what any other training saves
        return graph

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Inside, gradients and rates are the tensors that a replay reads."""
        members = [self._parameters[i] for i in self._given]
        varying = list(self._varying())
        rates = [group[key] for group, key in varying]
        try:
            for (group, key), rate in zip(varying, self._rates, strict=True):
                group[key] = rate
            for parameter, gradient in zip(members, self._gradients, strict=True):
                parameter.grad = gradient
            yield
        finally:
            for (group, key), value in zip(varying, rates, strict=True):
                group[key] = value
            for parameter in members:
                parameter.grad = None

    def _groups(self) -> Iterator[dict[str, Any]]:
        for optimizer in self._optimizers:
            yield from optimizer.param_groups

    def _varying(self) -> Iterator[tuple[dict[str, Any], str]]:
        """The groups' entries that vary; loading a state gives an optimizer other groups."""
        for group in self._groups():
            for key in _RATES:
                if key in group:
                    yield group, key
