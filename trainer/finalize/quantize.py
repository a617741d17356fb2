"""Which tensor is stored how, and the search for each row's clip.

Which bits a tensor gets is `trainer.sizes.stored_bits`'s: 32 and 16 are floats, fewer are
integers with one float16 scale per row. The grid itself is `trainer.quant`'s, rounding by a
Hessian `trainer.finalize.gptq`'s, the repair of the worst `trainer.finalize.lqer`'s.

Source: parameter-golf PRs #414 (quantiles, one for the whole matrix) and #951 (ratios, searched
per row with the rounded scale); clips in row deviations from #1394; the rule for 8 bits from the
baseline (techniques 2.22, 2.23).
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from trainer.errors import DataError, UsageError
from trainer.finalize.gptq import Factor, Factors, round_rows, row_errors, row_importance
from trainer.finalize.lqer import repair
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
from trainer.specs.final import CLIP_CANDIDATES, Gptq, Int8Rule, Lqer, Quantize, sd_clip


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """How a tensor is stored and what that cost.

    mse per entry, max_error of one; floor_share of the rows have the floor for a scale. Where a
    Hessian H was used, hessian_error is tr((W - Ŵ) H (W - Ŵ)ᵀ) per entry, nearest_hessian_error
    the same of rounding to nearest, and damping the share of H's mean diagonal that was added.
    bytes in the weights file: None until it is written.
    """

    name: str
    role: str
    part: str
    bits: int
    method: Literal["float", "nearest", "gptq"]
    mse: float
    max_error: float
    floor_share: float
    hessian_error: float | None = None
    nearest_hessian_error: float | None = None
    damping: float | None = None
    low_rank: int | None = None
    seconds: float = field(default=0.0, compare=False)
    bytes: int | None = None


def quantize_tensors(
    state: Mapping[str, Tensor],
    tensors: Sequence[TensorSize],
    spec: Quantize,
    hessians: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Stored], tuple[TensorRecord, ...]]:
    """Compute the stored form of every tensor of a state, whose list is the model's.

    Hessians are those of `trainer.finalize.hessians`; a matrix that has none is rounded to nearest.
    All of it but the low-rank repair runs on the device of the Hessians, or of the state where
    there are none; what is stored lies on the CPU. A GPU sums in another order: candidates which
    tie on a CPU may not, and a weight between two steps may fall to the other side. DataError names
    a tensor that is in one of state and list only or that does not fit its form, UsageError a layer
    of `float16_keys` without a key projection, or a Hessian that is missing or another matrix's.
    """
    names = {tensor.name for tensor in tensors}
    for name in sorted(state.keys() ^ names):
        side = "not in the model" if name in state else "not in the state"
        raise DataError(f"{name}: {side}; finalize with the model that was trained")
    for name in sorted(float16_key_names(spec) - names):
        raise UsageError(f"final.quantize.float16_keys: the model has no {name}; name other layers")
    factors = None if spec.gptq is None else Factors(hessians, tensors, spec.gptq)
    stored: dict[str, Stored] = {}
    records: dict[str, TensorRecord] = {}
    device = working_device(state, hessians)
    for tensor in tensors:
        weight = state[tensor.name].detach().to(device, torch.float32)
        stored[tensor.name], records[tensor.name] = _store(tensor, weight, spec, factors)
    if spec.lqer is not None:
        _repair_worst(state, stored, records, spec.lqer, factors)
    return stored, tuple(records.values())


def working_device(
    state: Mapping[str, Tensor], hessians: Mapping[str, Tensor] | None
) -> torch.device:
    """Return where a state is quantized: with its Hessians, or where it lies."""
    tensors = [*(hessians or {}).values(), *state.values()]
    return tensors[0].device if tensors else torch.device("cpu")


def quantize_matrix(
    weight: Tensor,
    bits: int,
    spec: Quantize,
    clip: str | None = None,
    importance: Tensor | None = None,
) -> tuple[Quantized, Tensor]:
    """Round [rows, cols] to nearest with the best row clips of the rule `clip`, or of the spec's.

    Clips in deviations are stretched by `importance` [rows]. Return also which rows' scale is the
    floor rather than the clip, bool [rows]. Among candidates of equal squared error the first is
    kept.
    """
    clips, floor = _clips(weight, bits, spec, clip or spec.clip, importance)
    if bits == 8 and spec.int8 is not None:
        return _round_int8(weight, clips[0], spec.int8)
    best_clip = torch.zeros(weight.shape[:1], device=weight.device)
    best_error = torch.full_like(best_clip, torch.inf, dtype=torch.float64)
    for candidate in clips:
        scale = row_scale(candidate, bits, floor)
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
    scale = row_scale(best_clip, bits, floor)
    q = quantize_rows(weight, scale, bits, symmetric=spec.symmetric)
    return Quantized(q, scale, bits), best_clip / levels(bits) < floor


def _round_int8(weight: Tensor, clip: Tensor, rule: Int8Rule) -> tuple[Quantized, Tensor]:
    scale = exact_scale(clip, 8, rule.scale_floor)
    # The public script rounds by the scale as it is before float16, and clips first: where the
    # floor rules, the clip lies inside the grid.
    bound = clip.unsqueeze(1)
    q = quantize_rows(weight.clamp(-bound, bound), scale, 8)
    return Quantized(q, scale.half(), 8), clip / levels(8) < rule.scale_floor


def _clips(
    weight: Tensor, bits: int, spec: Quantize, clip: str, importance: Tensor | None
) -> tuple[Tensor, float]:
    """Return the clips to try, float32 [candidates, rows], and the floor of their scales."""
    if bits == 8 and spec.int8 is not None:
        ascending = weight.abs().sort(dim=1).values
        return _quantile(ascending, spec.int8.quantile)[None], spec.int8.scale_floor
    return torch.stack(list(_row_clips(weight, clip, importance))), spec.scale_floor


def _row_clips(weight: Tensor, clip: str, importance: Tensor | None) -> Iterator[Tensor]:
    """Yield the candidate clips, each float32 [rows], in the order of the spec's table."""
    magnitude = weight.abs()
    k = sd_clip(clip)
    if k is not None:
        stretch = k if importance is None else k * importance
        yield (stretch * weight.double().std(dim=1, correction=0)).float()
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
    share_above = (rank - below).to(ascending.device)
    return torch.lerp(ascending[:, below], ascending[:, rank.ceil().int()], share_above)


def _store(
    tensor: TensorSize, weight: Tensor, spec: Quantize, factors: Factors | None
) -> tuple[Stored, TensorRecord]:
    started = time.perf_counter()
    bits = stored_bits(tensor, spec)
    record = TensorRecord(tensor.name, tensor.role, tensor.part, bits, "float", 0.0, 0.0, 0.0)
    largest = float(weight.abs().max())
    # Beyond this a float16 is infinite, and a float16 scale could only be met by clipping.
    if bits < 32 and largest > LARGEST_SCALE:
        raise DataError(
            f"{tensor.name}: a weight of magnitude {largest:g} does not fit float16; "
            "the training diverged, finalize another entry"
        )
    factor = factors.of(tensor.name) if factors is not None and bits < 16 else None
    if bits >= 16:
        stored = Floats(weight.clone() if bits == 32 else weight.half())
    elif factor is None or spec.gptq is None:
        stored, floored = quantize_matrix(weight, bits, spec, spec.clip_of(tensor.part))
        record = replace(record, method="nearest", floor_share=float(floored.float().mean()))
    else:
        stored, record = _round_by(factor, weight, record, spec, spec.gptq)
    at_rest = _on_cpu(stored)  # which waits for the device, so that the seconds are whole
    return at_rest, _measured(record, weight, stored, factor, time.perf_counter() - started)


def _on_cpu(stored: Stored) -> Stored:
    if isinstance(stored, Floats):
        return Floats(stored.tensor.cpu())
    return replace(stored, q=stored.q.cpu(), scale=stored.scale.cpu())


def _round_by(
    factor: Factor, weight: Tensor, record: TensorRecord, spec: Quantize, gptq: Gptq
) -> tuple[Quantized, TensorRecord]:
    """Round by a Hessian on the scales of every candidate, and keep what costs least at the output.

    Of each row, or of the matrix where the clip is one for all of it. Rounding to nearest is a
    candidate too, so the result is never worse. (Kept by plain squares, as in PR #1019, the result
    is up to 4 % worse at the output of a trained pr414, on text of its own and on other.)
    """
    hessian, bits, clip = factor.hessian, record.bits, spec.clip_of(record.part)
    importance = None
    if gptq.row_importance is not None:
        importance = row_importance(weight, hessian, gptq.row_importance)
    nearest, nearest_floored = quantize_matrix(weight, bits, spec, clip, importance)
    clips, floor = _clips(weight, bits, spec, clip, importance)
    floored = torch.cat([nearest_floored[None], clips / levels(bits) < floor])
    scales = row_scale(clips, bits, floor)
    q = round_rows(
        weight.repeat(len(scales), 1),  # rows do not see one another: all candidates at once
        scales.flatten(),
        bits,
        factor,
        gptq.block,
        symmetric=spec.symmetric,
    )
    q = torch.cat([nearest.q[None], q.view(-1, *weight.shape)])
    scales = torch.cat([nearest.scale[None], scales])
    forms = zip(q, scales, strict=True)
    errors = torch.stack([row_errors(weight - dequantize_rows(*form), hessian) for form in forms])
    judged = errors
    if spec.clip_scope == "matrix":
        judged = errors.sum(dim=1, keepdim=True).expand_as(errors)
    best, row = judged.argmin(dim=0), torch.arange(len(weight), device=q.device)
    return Quantized(q[best, row], scales[best, row], bits), replace(
        record,
        method="gptq",
        floor_share=float(floored[best, row].float().mean()),
        nearest_hessian_error=float(errors[0].sum()) / weight.numel(),
        damping=factor.damping,
    )


def _measured(
    record: TensorRecord, weight: Tensor, stored: Stored, factor: Factor | None, seconds: float
) -> TensorRecord:
    """Put into a record what the stored form loses, and the seconds that it took besides."""
    error = weight - restore(stored)
    output = None
    if factor is not None:
        rows = row_errors(error.to(factor.hessian.device), factor.hessian)
        output = float(rows.sum()) / weight.numel()
    return replace(
        record,
        mse=float(error.square().mean(dtype=torch.float64)),
        max_error=float(error.abs().max()),
        hessian_error=output,
        seconds=record.seconds + seconds,
    )


def _repair_worst(
    state: Mapping[str, Tensor],
    stored: dict[str, Stored],
    records: dict[str, TensorRecord],
    lqer: Lqer,
    factors: Factors | None,
) -> None:
    """Repair, in place, the matrices of the largest ‖W − W_q‖ that gain by it."""
    worst = sorted(records.values(), key=lambda r: r.mse * state[r.name].numel(), reverse=True)
    for record in [r for r in worst if r.bits < 16][: lqer.tensors]:
        started, plain = time.perf_counter(), stored[record.name]
        assert isinstance(plain, Quantized)
        weight = state[record.name].detach().to("cpu", torch.float32)
        factor = None if factors is None else factors.of(record.name)
        repaired = repair(weight, plain, lqer.rank, factor)
        if repaired.low_rank is not None:
            stored[record.name] = repaired
            record = replace(record, low_rank=repaired.low_rank.a.shape[1])
        seconds = time.perf_counter() - started
        records[record.name] = _measured(record, weight, repaired, factor, seconds)
