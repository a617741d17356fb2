"""Muon: momentum, orthogonalised. The pure update first, then the optimizer around it.

Source: Jordan et al., Muon (2024); coefficients and momentum warm-up as in the parameter-golf
baseline (techniques 2.17); Polar Express: arXiv 2505.16932, its numbers as in techniques 4.3.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.specs import train as specs

Triple = tuple[float, float, float]
Rate = float | Tensor

QUINTIC: Triple = (3.4445, -4.7750, 2.0315)
POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.156555, -22.483293, 15.878770),
    (4.042930, -2.808917, 0.500018),
    (3.891668, -2.772484, 0.506065),
    (3.285754, -2.368129, 0.464490),
    (2.346541, -1.709783, 0.423236),
)


def triples(spec: specs.Muon) -> tuple[Triple, ...]:
    """Return the coefficients (a, b, c) of every Newton–Schulz step in turn."""
    if spec.coefficients == "quintic":
        return (QUINTIC,) * spec.ns_steps
    return POLAR_EXPRESS[: spec.ns_steps]


def newton_schulz(matrices: Tensor, steps: tuple[Triple, ...], dtype: torch.dtype) -> Tensor:
    """Push the singular values of each matrix in a stack [N, rows, cols] towards 1."""
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in steps:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def momentum_at(spec: specs.Muon, step: int) -> float:
    """Return the momentum of a step: linear from `momentum_start` over the warm-up steps."""
    done = min(step / spec.momentum_warmup_steps, 1.0) if spec.momentum_warmup_steps else 1.0
    return spec.momentum_start + (spec.momentum - spec.momentum_start) * done


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, Newton–Schulz, decoupled weight decay scaled by the lr.

    Matrices of one shape are orthogonalised in one batch. With several ranks each takes a
    contiguous share of every batch and the shares are summed into place, so that all ranks
    apply the same bits. A group's lr and momentum may be 0-dim tensors on its device.
    """

    def __init__(self, params: list[torch.nn.Parameter], spec: specs.Muon) -> None:
        super().__init__(params, {"lr": spec.lr, "momentum": momentum_at(spec, 0)})
        self.spec = spec
        self.ns_steps = triples(spec)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            self._step_group(group["params"], group["lr"], group["momentum"])

    def _step_group(self, parameters: list[Tensor], lr: Rate, momentum: Rate) -> None:
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        buffers = [self._momentum_buffer(p) for p in parameters]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        stacks = []
        for members in _by_shape(parameters):
            stack = torch.stack([buffers[i] for i in members]).mul_(momentum)
            torch._foreach_add_(list(stack.unbind()), [gradients[i] for i in members])
            stacks.append((members, stack, *self._orthogonalised(stack)))
        if self.spec.weight_decay:
            torch._foreach_mul_(parameters, 1.0 - lr * self.spec.weight_decay)
        for members, stack, update, reduction in stacks:
            if reduction is not None:
                reduction.wait()
            # Into the stack's own dtype and layout: the sum below then is one launch.
            rows, cols = stack.shape[-2:]
            stack.copy_(update).mul_(lr * -(max(1.0, rows / cols) ** 0.5))
            torch._foreach_add_([parameters[i] for i in members], list(stack.unbind()))

    def _momentum_buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]

    def _orthogonalised(self, stack: Tensor) -> tuple[Tensor, dist.Work | None]:
        """Orthogonalise a stack, in the products' dtype; with several ranks it is whole only once
        the work beside it is done, which goes on while the next stack is orthogonalised."""
        dtype = self._ns_dtype(stack)
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return newton_schulz(stack, self.ns_steps, dtype), None
        rank, world_size = dist.get_rank(), dist.get_world_size()
        mine = slice(len(stack) * rank // world_size, len(stack) * (rank + 1) // world_size)
        update = torch.zeros_like(stack, dtype=dtype)
        if mine.start < mine.stop:
            update[mine] = newton_schulz(stack[mine], self.ns_steps, dtype)
        # Each matrix is one rank's and zero on the others: the sum is exact in any dtype.
        return update, dist.all_reduce(update, async_op=True)

    def _ns_dtype(self, stack: Tensor) -> torch.dtype:
        if self.spec.ns_dtype is not None:
            return torch.bfloat16 if self.spec.ns_dtype == "bfloat16" else torch.float32
        # Half precision is only faster where the device multiplies it.
        return torch.bfloat16 if stack.is_cuda else torch.float32


def _by_shape(parameters: list[Tensor]) -> list[list[int]]:
    """Group parameters of one shape, by their places in the list."""
    found: dict[torch.Size, list[int]] = {}
    for i, parameter in enumerate(parameters):
        found.setdefault(parameter.shape, []).append(i)
    return list(found.values())
