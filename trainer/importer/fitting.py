"""A public file and a model brought together: every tensor in its place, or one line a fault."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from trainer.blueprint import Blueprint, blueprint
from trainer.errors import DataError
from trainer.finalize.stored import Floats, Quantized, Stored
from trainer.importer.formats import Integers, PublicFile
from trainer.importer.hints import Settings, settings_for_part, settings_for_shape
from trainer.importer.names import common_prefix, public_tensors, shared_copies
from trainer.quant import SMALLEST_SCALE
from trainer.specs.model import LnScale, ModelSpec

Value = Tensor | Integers
MAX_LINES: Final = 20


@dataclass(frozen=True, slots=True)
class _Fault:
    """What is wrong with a tensor; the settings that would mend it, or else what to do."""

    tensor: str
    text: str
    settings: Settings = ()
    remedy: str = "import another file or name its own recipe with --recipe"


def fit(file: PublicFile, model: ModelSpec, where: str) -> dict[str, Stored]:
    """Give the file's tensors our names and shapes, in state-dict order, as they are stored.

    DataError with one line per cause, each starting with `where`, when a tensor is missing, extra,
    of another shape, or not finite, or when the model is one that no public script can hold.
    """
    known, faults = _with_fixed_norms(model)
    plan = blueprint(known)
    wanted = public_tensors(plan)
    prefix = common_prefix(file.tensors)
    values = {name.removeprefix(prefix): value for name, value in file.tensors.items()}
    faults += _drop_copies(values, plan)
    faults += _faults(values, plan)
    faults += [fault for name, value in values.items() if (fault := _value_fault(name, value))]
    if faults:
        lines = list(_lines(faults))
        more = [f"and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
        raise DataError("\n".join(f"{where}: {line}" for line in lines[:MAX_LINES] + more))
    return {tensor.ours: _stored(values[tensor.name], tensor.our_shape) for tensor in wanted}


def _with_fixed_norms(model: ModelSpec) -> tuple[ModelSpec, list[_Fault]]:
    """The model as public scripts can hold it, and what had to be taken from it for that."""
    if model.ln_scale is None or not model.ln_scale.learned:
        return model, []
    text = "no public script stores model.ln_scale.learned, they have the constant"
    fault = _Fault("", text, ("model.ln_scale.learned=false",))
    return replace(model, ln_scale=LnScale(learned=False)), [fault]


def _drop_copies(values: dict[str, Value], plan: Blueprint) -> list[_Fault]:
    """Forget the copies of shared matrices; those that are none are faults."""
    faults = []
    for copy, owner in shared_copies(plan).items():
        if copy not in values or owner not in values:
            continue
        is_sound = _value_fault(owner, values[owner]) is None  # a NaN equals nothing
        if not _equal(values.pop(copy), values[owner]) and is_sound:
            text = f"tensor {copy!r} differs from {owner!r}, which the recipe's layers share"
            faults.append(_Fault(copy, text, ("model.attention.shared_kv=null",)))
    return faults


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
    """One line for all faults that the same settings would mend, those of few settings first:
    a fault that they mend together has no line of its own."""
    causes: list[tuple[_Fault, list[_Fault]]] = []
    told: set[str] = set()
    for fault in sorted(faults, key=lambda fault: (not fault.settings, len(fault.settings))):
        if fault.settings and told.issuperset(fault.settings):
            next(m for first, m in causes if set(first.settings) & set(fault.settings)).append(
                fault
            )
        else:
            causes.append((fault, []))
            told.update(fault.settings)
    for first, others in causes:
        fix = f"set {' and '.join(first.settings)}" if first.settings else first.remedy
        count = "1 more tensor says" if len(others) == 1 else f"{len(others)} more tensors say"
        more = f" ({count} so)" if others else ""
        yield f"{first.text}; {fix}{more}"


def _value_fault(name: str, value: Value) -> _Fault | None:
    """What is wrong with a tensor's entries, whatever their shape."""
    other = "import another checkpoint"
    if isinstance(value, Tensor):
        if bool(torch.isfinite(value.detach().float()).all()):
            return None
        return _Fault(name, f"tensor {name!r} holds NaN or infinity", remedy=other)
    scale, q = value.scale.detach().float(), value.unpacked(()).detach()
    bound = 2 ** (value.bits - 1)
    if not bool((torch.isfinite(scale * bound) & (scale >= 0)).all()):
        text = f"tensor {name!r} has a scale that is below 0 or too large"
        return _Fault(name, text, remedy=other)
    if q.numel() and not -bound <= int(q.min()) <= int(q.max()) < bound:
        return _Fault(name, f"tensor {name!r} leaves its {value.bits}-bit grid", remedy=other)
    return None


def _stored(value: Value, shape: tuple[int, ...]) -> Stored:
    """Keep float16 and float32 as they are and integers with their scales; widen the rest."""
    if isinstance(value, Integers):
        return _stored_integers(value, shape)
    kept = value.detach()
    if kept.dtype not in (torch.float16, torch.float32):
        kept = kept.float()
    return Floats(kept.reshape(shape).contiguous())


def _stored_integers(value: Integers, shape: tuple[int, ...]) -> Stored:
    scale, q = value.scale.detach().float(), value.unpacked(shape).detach()
    rows = scale.expand(q.shape[:1]) if q.ndim else scale
    half = rows.half()
    if q.ndim != 2 or len(shape) != 2 or not torch.equal(half.float(), rows):
        # An artifact's grid is rows with float16 scales; the product itself always fits.
        return Floats((q.float() * rows.reshape(-1, *[1] * (q.ndim - 1))).reshape(shape))
    zero = half == 0  # a row of zeros under a floor that float16 rounds away
    q = torch.where(zero[:, None], torch.zeros_like(q), q)
    return Quantized(q.contiguous(), torch.where(zero, SMALLEST_SCALE, half).half(), value.bits)
