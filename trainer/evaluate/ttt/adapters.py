"""Low-rank adapters at the model's seams, a set for each document of a batch.

dy = (alpha / rank) · B A x, with A [B, rank, in] and B [B, out, rank], float32 and computed in the
stream's dtype, as `Linear` does with its weight.

Source: Hu et al., arXiv 2106.09685; the batched form of techniques 2.28 and 4.3-18.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.model.block import Block
from trainer.model.gpt import GPT
from trainer.model.head import TiedHead, UntiedHead
from trainer.model.linear import Absent, Linear
from trainer.specs.ttt import LoraTtt


@dataclass(slots=True, eq=False)
class Pair:
    """One adapter: its start A [rank, in], its matrices, and the rows of them in use."""

    start: Tensor
    a: Tensor
    b: Tensor
    rows: tuple[Tensor, Tensor]


class Seam(nn.Module):
    """What stands at one seam: a pair for each time that a forward comes by, in turn.

    Layers that run again or share a matrix come by more than once. The pairs are no parameters of
    the model.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.pairs: list[Pair] = []
        self.turns: Iterator[Pair] = iter(())

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Map the output y [B, T, out], given the input x [B, T, in]."""
        a, b = next(self.turns).rows
        return y + self.scale * ((x @ a.mT.to(x.dtype)) @ b.mT.to(x.dtype))


class Adapters:
    """The adapters of a model on `ttt.targets`, one set for each visit of a layer.

    A starts the same for every document, so that its score depends on no neighbour, unless `warm_a`
    keeps what the document in its row before it left. Attached while this is entered.
    """

    def __init__(self, model: GPT, ttt: LoraTtt, num_rows: int) -> None:
        """Make rows for so many documents at a time."""
        self.model = model
        self.ttt = ttt
        self.num_rows = num_rows
        self.seams: dict[nn.Module, Seam] = {}
        self.pairs: list[Pair] = []
        generator = torch.Generator().manual_seed(ttt.seed)
        for step in model.steps:
            for target, owner in _targets(model.blocks[step.layer]).items():  # type: ignore[arg-type]
                if target in ttt.targets:
                    self._add(owner, generator)
        if "head" in ttt.targets:
            head = model.head
            self._add(head.output if isinstance(head, UntiedHead) else head, generator)

    def __enter__(self) -> "Adapters":
        for owner, seam in self.seams.items():
            owner.adapter = seam
        return self

    def __exit__(self, *failure: object) -> None:
        for owner in self.seams:
            owner.adapter = Absent()

    def forward(self, tokens: Tensor, targets: Tensor, *others: int) -> Tensor:
        """Run the model's forward, row i of the batch through the adapters of row i."""
        for seam in self.seams.values():
            seam.turns = iter(seam.pairs)
        return self.model(tokens, targets, *others)

    def begin(self) -> None:
        """Make every row as new: B zero and, unless it is kept warm, A at its start."""
        for pair in self.pairs:
            pair.b.zero_()
            if not self.ttt.warm_a:
                pair.a.copy_(pair.start)

    def use(self, rows: int) -> list[Tensor]:
        """Let the next forward run the first rows; return their leaves, A and B of each pair."""
        for pair in self.pairs:
            pair.rows = (_leaf(pair.a, rows), _leaf(pair.b, rows))
        return [leaf for pair in self.pairs for leaf in pair.rows]

    def state(self) -> list[Tensor]:
        """Return what is kept from batch to batch."""
        return [pair.a for pair in self.pairs]

    def load(self, state: list[Tensor]) -> None:
        """Take up what another attempt's `state` was."""
        for pair, a in zip(self.pairs, state, strict=True):
            pair.a.copy_(a)

    def tensors(self) -> list[Tensor]:
        """Return the whole of what `use` gives rows of."""
        return [tensor for pair in self.pairs for tensor in (pair.a, pair.b)]

    def _add(self, owner: nn.Module, generator: torch.Generator) -> None:
        """Add a pair for one visit of the seam of `owner`."""
        out_width, in_width = _widths(owner, self.model)
        device = self.model.embedding.weight.device
        bound = 1.0 / math.sqrt(in_width)
        start = torch.empty(self.ttt.rank, in_width).uniform_(-bound, bound, generator=generator)
        a = start.to(device).expand(self.num_rows, -1, -1).clone()
        b = torch.zeros(self.num_rows, out_width, self.ttt.rank, device=device)
        pair = Pair(start.to(device), a, b, (a, b))
        self.seams.setdefault(owner, Seam(self.ttt.alpha / self.ttt.rank)).pairs.append(pair)
        self.pairs.append(pair)


def _targets(block: Block) -> dict[str, nn.Module]:
    """Where a visit of a layer may be adapted; its keys and values may be another layer's."""
    attention = block.attention
    key, value = attention.key_value
    return {
        "query": attention.query,
        "key": key,
        "value": value,
        "out": attention.out,
        "mlp": block.mlp,
    }


def _widths(owner: nn.Module, model: GPT) -> tuple[int, int]:
    """Output and input width of a seam; the MLP's is that of the stream."""
    if isinstance(owner, Linear):
        return owner.weight.shape[0], owner.weight.shape[1]
    vocab_size, dim = model.embedding.weight.shape
    return (vocab_size if isinstance(owner, TiedHead) else dim), dim


def _leaf(whole: Tensor, rows: int) -> Tensor:
    """Return the first rows as a leaf that shares the memory of the whole."""
    return whole[:rows].detach().requires_grad_()
