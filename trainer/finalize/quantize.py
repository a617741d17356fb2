"""Which tensor is stored how, and the search for each row's clip.

scalar → float32; anything else of at most `float_numel` entries → float16; matrix and embed →
integers of their bits with one float16 scale per row. The grid itself is `trainer.quant`'s.

Source: parameter-golf PRs #414 (quantiles) and #951 (ratios, searched per row with the rounded
scale); clips in row deviations from #1394 (techniques 2.22, 2.23). Unlike #414, the best
candidate is kept per row, not per matrix.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.errors import DataError
from trainer.quant import LARGEST_SCALE, dequantize_rows, levels, quantize_rows, row_scale
from trainer.specs.final import CLIP_CANDIDATES, Quantize, sd_clip


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """A matrix on the grid: q int8 [rows, cols], scale float16 [rows]."""

    q: Tensor
    scale: Tensor
    bits: int


@dataclass(frozen=True, slots=True, eq=False)
class Floats:
    """A tensor stored as it is, in float16 or float32."""

    tensor: Tensor


Stored = Quantized | Floats


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """What storing a tensor cost: squared error per entry, worst error, where the floor ruled."""

    name: str
    role: str
    bits: int
    mse: float
    max_error: float
    floor_share: float


def restore(stored: Stored) -> Tensor:
    """Return the float32 tensor that a reader of the artifact gets."""
    if isinstance(stored, Floats):
        return stored.tensor.float()
    return dequantize_rows(stored.q, stored.scale)


def quantize_tensors(
    state: Mapping[str, Tensor], roles: Mapping[str, str], spec: Quantize
) -> tuple[dict[str, Stored], tuple[TensorRecord, ...]]:
    """Decide and compute the stored form of every tensor of a state; DataError names a misfit."""
    stored: dict[str, Stored] = {}
    records: list[TensorRecord] = []
    for name, tensor in state.items():
        role = _role(name, roles)
        weight = tensor.detach().to("cpu", torch.float32)
        stored[name], floor_share = _store(name, weight, role, spec)
        records.append(_record(name, role, weight, stored[name], floor_share))
    return stored, tuple(records)


def quantize_matrix(
    weight: Tensor, bits: int, clip: str, scale_floor: float
) -> tuple[Quantized, Tensor]:
    """Quantize [rows, cols] with the row clips that `clip` names.

    Return also which rows' scale is the floor rather than the clip, bool [rows]. Among
    candidates of equal squared error the first is kept.
    """
    best_error = torch.full(weight.shape[:1], torch.inf, dtype=torch.float64)
    best_clip = torch.zeros(weight.shape[:1])
    best_scale = row_scale(best_clip, bits, scale_floor)
    for candidate in _row_clips(weight, clip):
        scale = row_scale(candidate, bits, scale_floor)
        restored = dequantize_rows(quantize_rows(weight, scale, bits), scale)
        error = (weight - restored).square().sum(dim=1, dtype=torch.float64)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_clip = torch.where(better, candidate, best_clip)
        best_scale = torch.where(better, scale, best_scale)
    floored = best_clip / levels(bits) < scale_floor
    return Quantized(quantize_rows(weight, best_scale, bits), best_scale, bits), floored


def _row_clips(weight: Tensor, clip: str) -> Iterator[Tensor]:
    """Yield the candidate clips, each float32 [rows], in the order of the spec's table."""
    magnitude = weight.abs()
    k = sd_clip(clip)
    if k is not None:
        yield (k * weight.double().std(dim=1, correction=0)).float()
    elif clip == "none":
        yield magnitude.amax(dim=1)
    elif clip.startswith("r"):
        row_max = magnitude.amax(dim=1)
        yield from (ratio * row_max for ratio in CLIP_CANDIDATES[clip])
    else:
        ascending = magnitude.sort(dim=1).values
        yield from (_quantile(ascending, share) for share in CLIP_CANDIDATES[clip])


def _quantile(ascending: Tensor, share: float) -> Tensor:
    """Interpolate linearly between the two nearest ranks, in float32 as torch.quantile does."""
    rank = torch.tensor(share, dtype=torch.float32) * (ascending.shape[1] - 1)
    below = rank.floor().int()
    return torch.lerp(ascending[:, below], ascending[:, rank.ceil().int()], rank - below)


def _role(name: str, roles: Mapping[str, str]) -> str:
    role = roles.get(name)
    if role not in ("matrix", "embed", "scalar"):
        raise DataError(f"{name}: its role is {role!r}; declare it as matrix, embed or scalar")
    return role


def _store(name: str, weight: Tensor, role: str, spec: Quantize) -> tuple[Stored, float]:
    """Return the stored form and the share of rows where the scale floor binds."""
    if role == "scalar":
        return Floats(weight.clone()), 0.0
    # Beyond this a float16 is infinite, and a float16 scale could only be met by clipping.
    largest = float(weight.abs().max())
    if largest > LARGEST_SCALE:
        raise DataError(
            f"{name}: a weight of magnitude {largest:g} does not fit float16; "
            "the training diverged, finalize another entry"
        )
    if weight.numel() <= spec.float_numel:
        return Floats(weight.half()), 0.0
    if weight.ndim != 2:
        raise DataError(f"{name}: shape {tuple(weight.shape)} has no rows; raise float_numel")
    bits = spec.embed_bits if role == "embed" else spec.matrix_bits
    quantized, floored = quantize_matrix(weight, bits, spec.clip, spec.scale_floor)
    return quantized, float(floored.float().mean())


def _record(
    name: str, role: str, weight: Tensor, stored: Stored, floor_share: float
) -> TensorRecord:
    error = (weight - restore(stored)).abs()
    bits = stored.bits if isinstance(stored, Quantized) else 8 * stored.tensor.element_size()
    return TensorRecord(
        name=name,
        role=role,
        bits=bits,
        mse=float(error.square().mean(dtype=torch.float64)),
        max_error=float(error.max()),
        floor_share=floor_share,
    )
