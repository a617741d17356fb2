"""A public file and a model brought together: every tensor in its place, or one line a fault."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.blueprint import Blueprint, blueprint
from trainer.errors import DataError
from trainer.finalize.quantize import Floats, Quantized, Stored
from trainer.importer.formats import Integers, PublicFile
from trainer.importer.hints import Settings, settings_for_part, settings_for_shape
from trainer.importer.names import common_prefix, public_tensors, shared_copies
from trainer.quant import SMALLEST_SCALE
from trainer.specs.model import ModelSpec

Value = Tensor | Integers


@dataclass(frozen=True, slots=True)
class _Fault:
    tensor: str
    text: str
    settings: Settings


def fit(file: PublicFile, model: ModelSpec, where: str) -> dict[str, Stored]:
    """Give the file's tensors our names and shapes, in state-dict order, as they are stored.

    DataError with one line per cause, each starting with `where`, when a tensor is missing, extra,
    of another shape, or not finite. UsageError for a model that no public script can hold.
    """
    plan = blueprint(model)
    wanted = public_tensors(plan)
    prefix = common_prefix(file.tensors)
    values = {name.removeprefix(prefix): value for name, value in file.tensors.items()}
    _drop_copies(values, plan, where)
    faults = list(_faults(values, plan))
    if faults:
        raise DataError("\n".join(f"{where}: {line}" for line in _lines(faults)))
    return {
        tensor.ours: _stored(values[tensor.name], tensor.our_shape, f"{where}: {tensor.name!r}")
        for tensor in wanted
    }


def _drop_copies(values: dict[str, Value], plan: Blueprint, where: str) -> None:
    """Forget the copies of shared matrices, once they have been seen to be copies."""
    for copy, owner in shared_copies(plan).items():
        if copy not in values or owner not in values:
            continue
        if not _equal(values.pop(copy), values[owner]):
            raise DataError(
                f"{where}: tensor {copy!r} differs from {owner!r}, which the recipe's layers "
                "share; set model.attention.shared_kv=null"
            )


def _equal(a: Value, b: Value) -> bool:
    if isinstance(a, Integers) and isinstance(b, Integers):
        return torch.equal(a.q, b.q) and torch.equal(a.scale, b.scale)
    return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)


def _faults(values: Mapping[str, Value], plan: Blueprint) -> Iterator[_Fault]:
    wanted = {tensor.name: tensor for tensor in public_tensors(plan)}
    shapes = {
        name: _shape(value, wanted[name].shape if name in wanted else ())
        for name, value in values.items()
    }
    for name, tensor in wanted.items():
        if name not in shapes:
            text = f"tensor {name!r} is missing, the recipe needs shape {tensor.shape}"
            yield _Fault(name, text, settings_for_part(name, shapes, plan.spec))
        elif shapes[name] != tensor.shape:
            text = f"tensor {name!r} has shape {shapes[name]}, the recipe needs {tensor.shape}"
            yield _Fault(name, text, settings_for_shape(tensor, shapes, plan.spec))
    for name, shape in shapes.items():
        if name not in wanted:
            text = f"tensor {name!r} of shape {shape} has no place in the recipe's model"
            yield _Fault(name, text, settings_for_part(name, shapes, plan.spec))


def _shape(value: Value, wanted: tuple[int, ...]) -> tuple[int, ...]:
    return value.shape_as(wanted) if isinstance(value, Integers) else tuple(value.shape)


def _lines(faults: list[_Fault]) -> Iterator[str]:
    """One line for all faults that the same setting would mend."""
    causes: dict[object, list[_Fault]] = {}
    for fault in faults:
        # What no setting mends is told tensor by tensor.
        causes.setdefault(fault.settings or fault.tensor, []).append(fault)
    for first, *others in causes.values():
        fix = f"; set {' and '.join(first.settings)}" if first.settings else ""
        more = f" ({len(others)} more tensors say so)" if others else ""
        yield f"{first.text}{fix}{more}"


def _stored(value: Value, shape: tuple[int, ...], what: str) -> Stored:
    """Keep float16 and float32 as they are and integers with their scales; widen the rest."""
    if isinstance(value, Integers):
        return _stored_integers(value, shape, what)
    kept = value.detach()
    if kept.dtype not in (torch.float16, torch.float32):
        kept = kept.float()
    if not bool(torch.isfinite(kept).all()):
        raise DataError(f"{what} holds NaN or infinity; import another checkpoint")
    return Floats(kept.reshape(shape).contiguous())


def _stored_integers(value: Integers, shape: tuple[int, ...], what: str) -> Stored:
    scale = value.scale.detach().float()
    if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
        raise DataError(f"{what} has a scale that is not 0 or above; import another file")
    q = value.unpacked(shape).detach()
    bound = 2 ** (value.bits - 1)
    if q.numel() and not -bound <= int(q.min()) <= int(q.max()) < bound:
        raise DataError(f"{what} leaves its {value.bits}-bit grid; import another checkpoint")
    rows = scale.expand(q.shape[:1]) if q.ndim else scale
    half = rows.half()
    if q.ndim != 2 or not torch.equal(half.float(), rows):
        # An artifact's grid is rows with float16 scales; the product itself always fits.
        return Floats((q.float() * rows.reshape(-1, *[1] * (q.ndim - 1))).reshape(shape))
    zero = half == 0  # a row of zeros under a floor that float16 rounds away
    q = torch.where(zero[:, None], torch.zeros_like(q), q)
    return Quantized(q.contiguous(), torch.where(zero, SMALLEST_SCALE, half).half(), value.bits)
