"""The Hessians that rounding needs: the second moments of what each matrix multiplies.

Hooks on the real modules watch the one forward, so that whatever shapes a matrix's inputs (smear,
value embedding, gates, ...) is seen. Which text is read is `trainer.finalize.calibration`'s.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from trainer.errors import UsageError
from trainer.model.gpt import GPT
from trainer.model.head import TiedHead
from trainer.model.linear import Linear
from trainer.runtime.distributed import Ranks
from trainer.runtime.tensors import load_tensors, save_tensors

TIED: Final = "embedding.weight"  # what a tied head multiplies by
FILE: Final = "hessians"


@torch.no_grad()
def collect_hessians(model: GPT, batches: Iterable[Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Run batches of tokens [B, T] through the model, each rank its share; return XᵀX per token.

    By the name of the parameter, float32 [in, in]. Matrices that read the same inputs share one
    tensor; what is visited several times in a forward adds up its visits. UsageError if a rank
    has no batch.
    """
    inputs = _Inputs()
    num_tokens = torch.zeros((), dtype=torch.int64, device=ranks.device)
    was_training = model.training
    model.eval()
    for batch in batches:
        # Only here: batches may come out of the same model.
        with _watching(model, inputs):
            model.logits(model.hidden(batch.to(ranks.device)))
        num_tokens += batch.numel()
    model.train(was_training)
    if ranks.max(float(not inputs.readers)):
        raise UsageError(
            f"final.quantize.gptq.sequences: too few for {ranks.world_size} workers; "
            "ask for at least one each"
        )
    total = int(ranks.sum(num_tokens))
    means = [ranks.sum(moment) / total for moment in inputs.moments]
    shared: dict[tuple[int, ...], Tensor] = {}
    for visits in inputs.readers.values():
        if tuple(visits) not in shared:
            shared[tuple(visits)] = torch.stack([means[visit] for visit in visits]).sum(0).float()
    return {name: shared[tuple(visits)] for name, visits in inputs.readers.items()}


class _Inputs:
    """The moments XᵀX float64 of each distinct input of a forward, in the order in which they are
    met, and which of them each matrix reads; a forward meets the same ones every time."""

    def __init__(self) -> None:
        self.moments: list[Tensor] = []
        self.readers: dict[str, list[int]] = {}

    def begin(self) -> None:
        self._is_first = not self.readers
        self._visit = -1
        self._last: Tensor | None = None

    def see(self, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Be the hook of the module that multiplies its first argument by the named matrix."""
        x = args[0]
        if x is not self._last:
            self._last = x
            self._visit += 1
            flat = x.flatten(0, -2).float()
            moment = flat.T @ flat
            if self._is_first:
                self.moments.append(moment.double())
            else:
                self.moments[self._visit] += moment
        if self._is_first:
            self.readers.setdefault(name, []).append(self._visit)


@contextmanager
def _watching(model: GPT, inputs: _Inputs) -> Iterator[None]:
    inputs.begin()
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, Linear | TiedHead):
            name = f"{path}.weight" if isinstance(module, Linear) else TIED
            handles.append(module.register_forward_pre_hook(partial(inputs.see, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def save_hessians(folder: Path, hessians: Mapping[str, Tensor]) -> None:
    """Write Hessians with a checksum; what is shared is stored once."""
    save_tensors(folder, {FILE: _moved(hessians, torch.device("cpu"))})


def load_hessians(folder: Path, device: torch.device) -> dict[str, Tensor]:
    """Read Hessians onto a device; DataError names a file that is missing or altered."""
    return _moved(load_tensors(folder, FILE), device)


def _moved(hessians: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move each tensor once, so that what was shared still is."""
    moved = {id(hessian): hessian.to(device) for hessian in hessians.values()}
    return {name: moved[id(hessian)] for name, hessian in hessians.items()}
