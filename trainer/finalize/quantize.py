"""Which tensor is stored how, and the search for each row's clip.

Which bits a tensor gets is `trainer.sizes.stored_bits`'s: 32 and 16 are floats, fewer are
integers with one float16 scale per row. The grid itself is `trainer.quant`'s.

Source: parameter-golf PRs #414 (quantiles, one for the whole matrix) and #951 (ratios, searched
per row with the rounded scale); clips in row deviations from #1394; the rule for 8 bits from the
baseline (techniques 2.22, 2.23).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.errors import DataError, UsageError
from trainer.finalize.stored import Floats, Quantized, Stored, restore
from trainer.quant import (
    LARGEST_SCALE,
    dequantize_rows,
    exact_scale,
    levels,
    quantize_rows,
    row_scale,
)
from trainer.sizes import TensorSize, float16_key_names, stored_bits
from trainer.specs.final import CLIP_CANDIDATES, Int8Rule, Quantize, sd_clip


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """What storing a tensor cost: squared error per entry, worst error, where the floor ruled."""

    name: str
    role: str
    part: str
    bits: int
    mse: float
    max_error: float
    floor_share: float


def quantize_tensors(
    state: Mapping[str, Tensor], tensors: Sequence[TensorSize], spec: Quantize
) -> tuple[dict[str, Stored], tuple[TensorRecord, ...]]:
    """Compute the stored form of every tensor of a state, whose list is the model's.

    DataError names a tensor that is in one of them only or that does not fit its form, UsageError
    a layer of `float16_keys` without a key projection.
    """
    names = {tensor.name for tensor in tensors}
    for name in sorted(state.keys() ^ names):
        side = "not in the model" if name in state else "not in the state"
        raise DataError(f"{name}: {side}; finalize with the model that was trained")
    for name in sorted(float16_key_names(spec) - names):
        raise UsageError(f"final.quantize.float16_keys: the model has no {name}; name other layers")
    stored: dict[str, Stored] = {}
    records: list[TensorRecord] = []
    for tensor in tensors:
        weight = state[tensor.name].detach().to("cpu", torch.float32)
        stored[tensor.name], floor_share = _store(tensor, weight, spec)
        records.append(_record(tensor, weight, stored[tensor.name], floor_share))
    return stored, tuple(records)


def quantize_matrix(weight: Tensor, bits: int, spec: Quantize) -> tuple[Quantized, Tensor]:
    """Quantize [rows, cols] with the row clips that the spec names.

    Return also which rows' scale is the floor rather than the clip, bool [rows]. Among
    candidates of equal squared error the first is kept.
    """
    if bits == 8 and spec.int8 is not None:
        return _quantize_int8(weight, spec.int8)
    best_error = torch.full(weight.shape[:1], torch.inf, dtype=torch.float64)
    best_clip = torch.zeros(weight.shape[:1])
    for candidate in _row_clips(weight, spec.clip):
        scale = row_scale(candidate, bits, spec.scale_floor)
        q = quantize_rows(weight, scale, bits, symmetric=spec.symmetric)
        squares = (weight - dequantize_rows(q, scale)).square()
        if spec.clip_scope == "matrix":
            # In float32, as the public script has it: what rounds to the same mean is a tie.
            error = squares.mean().double().expand_as(best_error)
        else:
            error = squares.sum(dim=1, dtype=torch.float64)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_clip = torch.where(better, candidate, best_clip)
    scale = row_scale(best_clip, bits, spec.scale_floor)
    q = quantize_rows(weight, scale, bits, symmetric=spec.symmetric)
    return Quantized(q, scale, bits), best_clip / levels(bits) < spec.scale_floor


def _quantize_int8(weight: Tensor, rule: Int8Rule) -> tuple[Quantized, Tensor]:
    clip = _quantile(weight.abs().sort(dim=1).values, rule.quantile)
    scale = exact_scale(clip, 8, rule.scale_floor)
    # The public script rounds by the scale as it is before float16, and clips first: where the
    # floor rules, the clip lies inside the grid.
    bound = clip.unsqueeze(1)
    q = quantize_rows(weight.clamp(-bound, bound), scale, 8)
    return Quantized(q, scale.half(), 8), clip / levels(8) < rule.scale_floor


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


def _store(tensor: TensorSize, weight: Tensor, spec: Quantize) -> tuple[Stored, float]:
    """Return the stored form and the share of rows where the scale floor binds."""
    bits = stored_bits(tensor, spec)
    if bits == 32:
        return Floats(weight.clone()), 0.0
    # Beyond this a float16 is infinite, and a float16 scale could only be met by clipping.
    largest = float(weight.abs().max())
    if largest > LARGEST_SCALE:
        raise DataError(
            f"{tensor.name}: a weight of magnitude {largest:g} does not fit float16; "
            "the training diverged, finalize another entry"
        )
    if bits == 16:
        return Floats(weight.half()), 0.0
    quantized, floored = quantize_matrix(weight, bits, spec)
    return quantized, float(floored.float().mean())


def _record(tensor: TensorSize, weight: Tensor, stored: Stored, floor_share: float) -> TensorRecord:
    error = (weight - restore(stored)).abs()
    bits = stored.bits if isinstance(stored, Quantized) else 8 * stored.tensor.element_size()
    return TensorRecord(
        name=tensor.name,
        role=tensor.role,
        part=tensor.part,
        bits=bits,
        mse=float(error.square().mean(dtype=torch.float64)),
        max_error=float(error.max()),
        floor_share=floor_share,
    )
