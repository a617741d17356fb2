"""Rounding that lets later columns make up for the errors of earlier ones.

`Factors` makes Hessians ready, `round_rows` rounds a matrix by one, on the scales that it is given,
and `row_errors` says what a rounding costs. Which scales are tried, and what is kept, is
`trainer.finalize.quantize`'s choice. `walk_block`, the inner loop, has a fast twin for CUDA devices
in `trainer.finalize.gptq_triton`.

Source: Frantar et al. 2022 (arXiv 2210.17323); parameter-golf PR #1019 (techniques 2.24).
Shapes: weight [rows, cols], hessian [cols, cols]. Everything runs on the Hessian's device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from trainer.errors import DataError, UsageError
from trainer.kernels.chosen import require_triton
from trainer.quant import dequantize_rows, quantize_rows
from trainer.sizes import TensorSize
from trainer.specs.final import Gptq

RUNGS: Final = 5  # dampings tried, each ten times the one before


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """A Hessian made ready: with its columns in `order`, and `damping` of its mean on its
    diagonal, it is R Rᵀ. root R float32 [cols, cols], upper triangular; order int64 [cols]; dead
    bool [cols], in the matrix's own order: inputs that were always zero."""

    hessian: Tensor
    root: Tensor
    order: Tensor
    dead: Tensor
    damping: float


class Factors:
    """The factors of a model's Hessians, each made once for neighbours that share it."""

    def __init__(
        self, hessians: Mapping[str, Tensor] | None, tensors: Sequence[TensorSize], gptq: Gptq
    ) -> None:
        """UsageError if there are no Hessians, or one is not of its matrix's width."""
        if hessians is None:
            raise UsageError("final.quantize.gptq: no Hessians were given; collect them first")
        self._gptq = gptq
        self._last: Factor | None = None
        self._hessians: dict[str, Tensor] = {}
        for tensor in tensors:
            hessian = hessians.get(tensor.name)
            if hessian is None or (tensor.role == "embed" and not gptq.embeddings):
                continue
            if hessian.shape != tensor.shape[-1:] * 2:
                raise UsageError(
                    f"{tensor.name}: a Hessian of shape {tuple(hessian.shape)} for inputs of "
                    f"{tensor.shape[-1]}; collect the Hessians with this model"
                )
            self._hessians[tensor.name] = hessian

    def of(self, name: str) -> Factor | None:
        """Return a tensor's factor, None where it is to be rounded without."""
        hessian = self._hessians.get(name)
        if hessian is None:
            return None
        if self._last is None or self._last.hessian is not hessian:
            self._last = factorize(hessian, self._gptq, name)
        return self._last


def factorize(hessian: Tensor, gptq: Gptq, name: str) -> Factor:
    """Damp, order and factorize a Hessian; DataError if no damping makes that possible."""
    if not bool(torch.isfinite(hessian).all()):
        raise DataError(f"{name}: its Hessian is not finite; the training diverged, take another")
    diagonal = hessian.diagonal().double()
    dead = diagonal == 0
    order = torch.arange(len(diagonal), device=hessian.device)
    if gptq.act_order:
        order = diagonal.argsort(descending=True, stable=True)
    ordered = hessian.double()[order][:, order]
    ordered.diagonal().add_(dead[order])
    step = diagonal.mean() * torch.eye(len(order), dtype=torch.float64, device=hessian.device)
    for rung in range(RUNGS):
        damping = gptq.damping * 10.0**rung
        # Turned round, because the factor that torch gives is lower triangular.
        lower, failed = torch.linalg.cholesky_ex((ordered + damping * step).flip(0, 1))
        if not int(failed):
            return Factor(hessian, lower.flip(0, 1).float(), order, dead, damping)
    raise DataError(
        f"{name}: its Hessian cannot be factorized, not even with damping {damping:g}; "
        "calibrate on more sequences"
    )


def row_importance(weight: Tensor, hessian: Tensor, share: float) -> Tensor:
    """Return 1 + share · (ρ − 1) of each row, ρ its mean |w|·diag H over that of all rows.

    Source: parameter-golf PR #1412 (techniques 4.3-22).
    """
    magnitude = weight.abs() @ hessian.diagonal().to(weight)
    return 1.0 + share * (magnitude / magnitude.mean().clamp(min=1e-30) - 1.0)


def round_rows(
    weight: Tensor, scale: Tensor, bits: int, factor: Factor, block: int, *, symmetric: bool
) -> Tensor:
    """Round a matrix on the grid of float16 scales [rows]; int8 [rows, cols].

    Column by column: what rounding took from the ones before moves the aim of the next, at once
    inside a block and for all others at its end. What is zero stays zero, as it was pruned, and so
    does what only ever meets zeros.

    With R of the Hessian itself instead of the factor of its inverse: the same update in other
    terms (Chen et al. 2025, arXiv 2507.18553), without an inverse.
    """
    # Transposed, so that a column lies in one piece.
    own = weight.masked_fill(factor.dead, 0.0).T[factor.order].contiguous()
    aim, scale = own.clone(), scale.float()
    q = torch.empty_like(own, dtype=torch.int8)
    mix = factor.root / factor.root.diagonal()
    walk = walk_on(own.device)
    for first in range(0, len(own), block):
        stop = min(first + block, len(own))
        columns, within = slice(first, stop), mix[first:stop, first:stop]
        walk(own[columns], aim[columns], within, scale, q[columns], bits, symmetric=symmetric)
        aim[stop:].addmm_(mix[columns, stop:].T, aim[columns])
    return q[factor.order.argsort()].T.contiguous()


def walk_on(device: torch.device) -> Callable[..., None]:
    """Return the walk over a block's columns for a device: `walk_block` or its fast twin."""
    require_triton(device, "final.quantize.gptq", "quantize on a CPU")
    if device.type == "cuda":
        from trainer.finalize.gptq_triton import walk_block_triton

        return walk_block_triton
    return walk_block


def walk_block(
    own: Tensor, aim: Tensor, mix: Tensor, scale: Tensor, q: Tensor, bits: int, *, symmetric: bool
) -> None:
    """Round the columns of a block in turn: the aim of each to `q`, and pass on what it lost.

    own, aim, q [block, rows], mix [block, block], scale float32 [rows]. In place: `q` takes the
    integers, `aim` what rounding took from each column of `own`.
    """
    alive = own != 0
    for k, column in enumerate(aim):
        steps = quantize_rows(column[:, None], scale, bits, symmetric=symmetric)
        steps *= alive[k][:, None]
        q[k] = steps[:, 0]
        lost = own[k] - dequantize_rows(steps, scale)[:, 0]
        aim[k + 1 :].addr_(mix[k, k + 1 :], lost)
        aim[k] = lost


def row_errors(error: Tensor, hessian: Tensor) -> Tensor:
    """Return e H eᵀ for each row e of W − Ŵ, its mean squared error at the output; float64."""
    return ((error @ hessian) * error).sum(dim=1, dtype=torch.float64)
