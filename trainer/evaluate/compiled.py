"""An evaluation's forward, compiled for the one shape that most of its work has.

A batch of another shape is filled up to that one, or stays eager where that is cheaper: there is
one graph, and no odd length at the end of a text builds another. Which batch goes which way
follows from the whole plan, so neither the ranks that share it nor a resumed part changes a score.
"""

import logging
import time
from collections import Counter

import torch
from torch import Tensor

from trainer.blueprint import Blueprint
from trainer.evaluate.tape import Forward
from trainer.evaluate.windows import Shape, Windows, batches, shape_of
from trainer.model.gpt import GPT

logger = logging.getLogger(__name__)

EAGER_COST = 2.5  # of a token, over a compiled one: PR #414's model, one H200, bfloat16
# torch refuses a ninth graph of one forward; models of one plan may differ in dtype and kernels.
_MOST_GRAPHS = 64


class _Graphs:
    """The graphs of a process, which scores one final after another: those of one model and shape,
    because too many of one forward end in a refusal."""

    def __init__(self) -> None:
        self._of: tuple[Blueprint, Shape] | None = None

    def keep_those_of(self, plan: Blueprint, shape: Shape) -> None:
        """Drop all graphs where the last ones were of another model or shape."""
        if self._of not in (None, (plan, shape)):
            torch._dynamo.reset()
        self._of = plan, shape


_graphs = _Graphs()


def common_shape(plan: Windows, size: int) -> Shape:
    """Return the shape whose batches read most of a plan's tokens."""
    shapes = Counter(map(shape_of, batches(plan, size)))
    return max(shapes, key=lambda shape: (shapes[shape] * shape.tokens, shape))


class Compiled:
    """A model's forwards over a plan, in batches of up to `size` windows; `shape` is compiled."""

    def __init__(self, model: GPT, plan: Windows, size: int) -> None:
        self.model = model
        self.shape = common_shape(plan, size)
        self._graph = torch.compile(model, fullgraph=True, dynamic=False)
        self._is_cold = True

    def forward_for(self, batch: Windows) -> tuple[Forward, Shape]:
        """Return what scores a batch, and the shape to fill it up to."""
        own = shape_of(batch)
        if self.shape.holds(own) and own.tokens * EAGER_COST >= self.shape.tokens:
            return self._forward, self.shape
        return self.model, own

    def _forward(self, tokens: Tensor, targets: Tensor, width: int) -> Tensor:
        if not self._is_cold:
            return self._graph(tokens, targets, width)
        self._is_cold = False
        _graphs.keep_those_of(self.model.plan, self.shape)
        started = time.monotonic()
        with torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS):
            losses = self._graph(tokens, targets, width)
        logger.info(
            "evaluate.compile: batches of %d windows of %d tokens, %d scored: %.1f s to compile",
            *self.shape,
            time.monotonic() - started,
        )
        return losses
