"""The packages' attention over sequences of different lengths, laid end to end, as operators that
`torch.compile` takes whole. Their own kernels are called, as the packages' functions call them.

Source: flash-attn-4 4.0.0b36 (flash_attn/cute/interface.py), FlashAttention's hopper/ and
flash_attn/flash_attn_interface.py; Dao 2023, Shah et al. 2024, Zadouri et al. 2026.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from trainer.kernels.attention import Attend
from trainer.kernels.documents import SPARE, Within, starts_operator
from trainer.specs.kernels import Backend

Forward = Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Package:
    """The two kernels of a package, under a name of their own.

    forward maps q [N, H, E], k and v [N, K, E], the bounds int32 [S + 1] of S sequences and the
    longest one's bound to the output [N, H, E] and the scores' log-sum-exp float32 [H, N];
    backward maps the output's gradient, q, k, v, those two, the bounds and the longest to the
    gradients of q, k, v. Both get at least `least` sequences, the last ones empty.
    """

    name: str
    forward: Forward
    backward: Backward
    least: int = 1


def within_by(package: Package, bos: int) -> Within:
    """Attention of each document on its own by a package's kernels."""
    operator, find = _operator(package), starts_operator()

    def within(tokens: Tensor) -> Attend:
        return partial(_attend, operator, *find(tokens, bos))

    return within


def _attend(
    operator: Callable[..., tuple[Tensor, Tensor]],
    starts: Tensor,
    count: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> Tensor:
    batch, num_tokens = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return operator(q, k, v, starts, count, num_tokens)[0].unflatten(0, (batch, num_tokens))


@cache
def _operator(package: Package) -> Callable[..., tuple[Tensor, Tensor]]:
    """Register a package's kernels with torch, once a process, and return the operator."""

    def bounds(starts: Tensor, count: Tensor) -> Tensor:
        return starts[: max(int(count), package.least) + 1]

    @torch.library.custom_op(f"fairway::varlen_{package.name}", mutates_args=())
    def forward(
        q: Tensor, k: Tensor, v: Tensor, starts: Tensor, count: Tensor, longest: int
    ) -> tuple[Tensor, Tensor]:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        return package.forward(q, k, v, bounds(starts, count), longest)

    @forward.register_fake
    def _(
        q: Tensor, k: Tensor, v: Tensor, starts: Tensor, count: Tensor, longest: int
    ) -> tuple[Tensor, Tensor]:
        lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
        return torch.empty_like(q, memory_format=torch.contiguous_format), lse

    @torch.library.custom_op(f"fairway::varlen_{package.name}_backward", mutates_args=())
    def backward(
        grad: Tensor, saved: list[Tensor], starts: Tensor, count: Tensor, longest: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = [x.contiguous() for x in (grad, *saved)]
        return package.backward(*tensors, bounds(starts, count), longest)

    @backward.register_fake
    def _(
        grad: Tensor, saved: list[Tensor], starts: Tensor, count: Tensor, longest: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in saved[:3])
        return dq, dk, dv

    def keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        *tensors, starts, count, ctx.longest = inputs
        ctx.save_for_backward(*tensors, *output, starts, count)

    def learn(ctx, grad: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, starts, count = ctx.saved_tensors
        return *backward(grad, saved, starts, count, ctx.longest), None, None, None

    forward.register_autograd(learn, setup_context=keep)
    return forward


@cache
def package_of(name: Backend) -> Package:
    """The kernels of flash_attn_4, flash_attn_3 or flash_attn_2; the package is imported now."""
    makers = {"flash_attn_4": _flash_4, "flash_attn_3": _flash_3, "flash_attn_2": _flash_2}
    return makers[name]()


def _flash_4() -> Package:
    from flash_attn.cute import interface as fa4  # type: ignore[import-not-found]

    def forward(
        q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = fa4._flash_attn_fwd(
            q, k, v, causal=True, return_lse=True, **_lengths(ends, longest)
        )
        return out, lse

    def backward(*given) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, k, v, out, lse, ends, longest = given
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        lengths = _lengths(ends, longest)
        fa4._flash_attn_bwd(q, k, v, out, grad, lse, causal=True, dq=dq, dk=dk, dv=dv, **lengths)
        return dq, dk, dv

    # Its kernels for up to 256 sequences and for more are two, each built when first used: with
    # enough empty ones it is always the second, which also finds its way past them at no cost.
    return Package("flash_attn_4", forward, backward, least=SPARE)


def _lengths(ends: Tensor, longest: int) -> dict[str, Tensor | int]:
    return {
        "cu_seqlens_q": ends,
        "cu_seqlens_k": ends,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
    }


def _flash_3() -> Package:
    import flash_attn_interface as fa3  # type: ignore[import-not-found]

    def forward(
        q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int
    ) -> tuple[Tensor, Tensor]:
        # By position, because releases differ in names: new keys and values and an output, then
        # new and used lengths, then nine of paging, rotation and scales, are left out.
        lengths = (ends, ends, None, None, None, longest, longest)
        given = (*[None] * 4, *lengths, *[None] * 9, _scale(q), True)
        out, lse, *_ = fa3._flash_attn_forward(q, k, v, *given)
        return out, lse

    def backward(*given) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, k, v, out, lse, ends, longest = given
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        lengths = (ends, ends, None, None, longest, longest)
        fa3._flash_attn_backward(grad, q, k, v, out, lse, *lengths, *grads, _scale(q), True)
        return grads

    return Package("flash_attn_3", forward, backward)


def _flash_2() -> Package:
    from flash_attn import flash_attn_interface as fa2  # type: ignore[import-not-found]

    def forward(
        q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int
    ) -> tuple[Tensor, Tensor]:
        lengths = (ends, ends, longest, longest)
        out, lse, *_ = fa2._flash_attn_varlen_forward(q, k, v, *lengths, 0.0, _scale(q), True)
        return out, lse

    def backward(*given) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, k, v, out, lse, ends, longest = given
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        lengths = (ends, ends, longest, longest)
        plain = (0.0, _scale(q), True, -1, -1, 0.0, None, False)  # no window, cap or slopes
        fa2._flash_attn_varlen_backward(grad, q, k, v, out, lse, *grads, *lengths, *plain)
        return grads

    return Package("flash_attn_2", forward, backward)


def _scale(q: Tensor) -> float:
    return 1.0 / math.sqrt(q.shape[-1])
