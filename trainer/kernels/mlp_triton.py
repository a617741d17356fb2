"""The kernels of `trainer.kernels.mlp`, in Triton, for compute capability 9.

One kernel serves both products that end in the activation, forwards with up [F, D] as it lies and
backwards with down [D, F] as it lies. Programs stay on their multiprocessor and walk over tiles, so
that the loads of a tile start while the last one is stored, or two share a multiprocessor and one
multiplies while the other stores. Every matrix goes through a tensor memory descriptor: what lies
past an edge is read as zero and not written.
"""

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor
from triton.tools.tensor_descriptor import (  # type: ignore[import-not-found]
    TensorDescriptor,
)


def project_up(x: Tensor, up: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """Return h and u [N, F] of x [N, D] and up [F, D]; without a slope u is h."""
    h = x.new_empty(len(x), len(up))
    u = torch.empty_like(h) if slope else h
    _launch((x, up, u, h), slope, is_backward=False)
    return h, u


def project_back(dy: Tensor, down: Tensor, kept: Tensor, slope: float) -> Tensor:
    """Return du [N, F] of dy [N, D], down [D, F] and u, or h without a slope, [N, F]."""
    du = torch.empty_like(kept)
    _launch((dy, down, kept, du), slope, is_backward=True)
    return du


def _launch(matrices: tuple[Tensor, ...], slope: float, *, is_backward: bool) -> None:
    (num_rows, depth), width = matrices[0].shape, matrices[-1].shape[1]
    count = _multiprocessors(matrices[0].device)

    def grid(meta: dict) -> tuple[int]:
        tiles = triton.cdiv(num_rows, meta["BLOCK_M"]) * triton.cdiv(width, meta["BLOCK_N"])
        return (min(tiles, count * meta["AT_ONCE"]),)

    with torch.cuda.device_of(matrices[0]):
        # The blocks are those of a configuration: its hook sets them before each start.
        _project[grid](  # pyright: ignore[reportIndexIssue]
            *(TensorDescriptor.from_tensor(one, [1, 1]) for one in matrices),
            *(num_rows, width, depth, slope, num_rows.bit_length() // 2),
            BACKWARD=is_backward,
            LEAKY=slope != 0,
        )


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def _shape_blocks(given: dict) -> None:
    m, n, k = (given[f"BLOCK_{side}"] for side in "MNK")
    given["a_desc"].block_shape = [m, k]
    given["b_desc"].block_shape = [k, n] if given["BACKWARD"] else [n, k]
    for name in ("kept_desc", "out_desc"):
        given[name].block_shape = [m, n // given["PARTS"]]


def _config(block: tuple[int, int, int], parts: int, at_once: int, stages: int, warps: int):
    m, n, k = block
    meta = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "PARTS": parts, "AT_ONCE": at_once}
    return triton.Config(meta, num_stages=stages, num_warps=warps, pre_hook=_shape_blocks)


# Which of them is fastest is measured at the first call of a shape, so that has to come before a
# CUDA graph is captured. All add along K in the same order: the choice does not change the sums.
# Rows count by powers of four, or a text of documents would be measured at length after length.
_CONFIGS = [
    _config((128, 256, 64), parts=2, at_once=1, stages=3, warps=8),
    _config((128, 256, 64), parts=2, at_once=1, stages=4, warps=8),  # forwards only: its memory
    _config((256, 128, 64), parts=2, at_once=1, stages=3, warps=8),
    _config((128, 128, 64), parts=2, at_once=2, stages=2, warps=4),
    _config((128, 128, 64), parts=2, at_once=2, stages=3, warps=4),
    _config((64, 256, 64), parts=2, at_once=2, stages=2, warps=4),
]


@triton.jit
def _activated(u, slope, LEAKY: tl.constexpr):
    if LEAKY:
        rectified = tl.where(u > 0, u, slope * u)
    else:
        rectified = tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return rectified * rectified


@triton.jit
def _slope_at(kept, slope, LEAKY: tl.constexpr):
    """Return 2 · leaky(u) · leaky′(u); kept is u if LEAKY, else h."""
    factor = tl.where(kept > 0, kept, slope * slope * kept) if LEAKY else tl.sqrt(kept)
    return 2.0 * factor


@triton.jit
def _finish(
    sums, kept_desc, out_desc, row, column, slope, BACKWARD: tl.constexpr, LEAKY: tl.constexpr
):
    """Store part of a tile; forwards with u beside it if LEAKY."""
    if BACKWARD:
        kept = kept_desc.load([row, column]).to(tl.float32)
        out = sums * _slope_at(kept, slope, LEAKY)
    else:
        if LEAKY:
            kept_desc.store([row, column], sums.to(kept_desc.dtype))
        out = _activated(sums, slope, LEAKY)
    out_desc.store([row, column], out.to(out_desc.dtype))


@triton.autotune(configs=_CONFIGS, key=["magnitude", "width", "depth", "BACKWARD", "LEAKY"])
@triton.jit
def _project(
    a_desc, b_desc, kept_desc, out_desc, num_rows, width, depth, slope, magnitude,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr, AT_ONCE: tl.constexpr,
    BACKWARD: tl.constexpr, LEAKY: tl.constexpr,
):  # fmt: skip
    # Tiles of the same rows follow one another: at one time the programs read few rows of a, and
    # all of b, which the cache holds.
    across = tl.cdiv(width, BLOCK_N)
    tiles = tl.cdiv(num_rows, BLOCK_M) * across
    steps = tl.cdiv(depth, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row, column = (tile // across) * BLOCK_M, (tile % across) * BLOCK_N
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(steps):
            a = a_desc.load([row, step * BLOCK_K])
            if BACKWARD:
                b = b_desc.load([step * BLOCK_K, column])
            else:
                b = b_desc.load([column, step * BLOCK_K]).T
            sums = tl.dot(a, b, sums)
        if PARTS == 2:
            halves = tl.permute(tl.reshape(sums, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            _finish(left, kept_desc, out_desc, row, column, slope, BACKWARD, LEAKY)
            column += BLOCK_N // 2
            _finish(right, kept_desc, out_desc, row, column, slope, BACKWARD, LEAKY)
        else:
            _finish(sums, kept_desc, out_desc, row, column, slope, BACKWARD, LEAKY)
