"""A bank entry in, an artifact folder out: the one place where the steps meet.

What counts is what lies in the folder afterwards, measured on disk. Choosing the entry is the
caller's, scoring `trainer.evaluate`'s.
"""

import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from trainer.blueprint import blueprint
from trainer.errors import DataError
from trainer.finalize.artifact import check_shapes, write_weights
from trainer.finalize.code import write_code
from trainer.finalize.gptq import row_errors
from trainer.finalize.prune import num_pruned, prune
from trainer.finalize.quantize import TensorRecord, quantize_tensors, working_device
from trainer.finalize.stored import Stored, restore
from trainer.finalize.trim import Trimmed, trim_ones
from trainer.runtime.files import sha256_file
from trainer.sizes import TensorSize, is_pruned, tensor_sizes
from trainer.specs.final import FinalSpec
from trainer.specs.model import ModelSpec

WEIGHTS_FILE: Final = "weights.fw"


@dataclass(frozen=True, slots=True)
class FinalReport:
    """What was written. artifact_bytes is the whole folder, not the sum of the two files."""

    weights_bytes: int
    code_bytes: int
    artifact_bytes: int
    num_pruned: int
    num_trimmed: int
    tensors: tuple[TensorRecord, ...]
    weights_sha256: str
    clock_s: dict[str, float]


def finalize(
    state: Mapping[str, Tensor],
    model: ModelSpec,
    final: FinalSpec,
    folder: Path,
    tokenizer_sha256: str,
    hessians: Mapping[str, Tensor] | None = None,
) -> FinalReport:
    """Prune, quantize, trim and write a state as `weights.fw` and its code; report from the files.

    `model` is the trained one; the artifact holds what it exports. Hessians are those of
    `quantize_tensors`, and so is the device, which the state is moved to once.
    """
    started = time.perf_counter()
    exported = model.exported()
    tensors = tensor_sizes(blueprint(exported))
    checked = _checked(state, model, working_device(state, hessians))
    pruned, total_pruned = _prune_large(checked, tensors, final)
    after_prune = time.perf_counter()
    stored, records = quantize_tensors(pruned, tensors, final.quantize, hessians)
    after_quantize = time.perf_counter()
    weights, sizes = folder / WEIGHTS_FILE, dict[str, int]()

    def write(forms: Mapping[str, Stored]) -> int:
        written = write_weights(weights, exported, forms, final.compress, tokenizer_sha256)
        sizes.update(written.by_tensor)
        return written.num_bytes

    if final.trim_ones is None:
        write(stored)
        trimmed = Trimmed(stored, 0, frozenset())
    else:
        trimmed = trim_ones(stored, final.trim_ones.weights_bytes, write)
    code = write_code(folder, final.code)
    after_write = time.perf_counter()
    return FinalReport(
        weights_bytes=weights.stat().st_size,
        code_bytes=code.stat().st_size,
        artifact_bytes=artifact_bytes(folder),
        num_pruned=total_pruned,
        num_trimmed=trimmed.count,
        tensors=tuple(
            replace(_measured_again(record, pruned, trimmed, hessians), bytes=sizes[record.name])
            for record in records
        ),
        weights_sha256=sha256_file(weights),
        clock_s={
            "prune": after_prune - started,
            "quantize": after_quantize - after_prune,
            "write": after_write - after_quantize,
        },
    )


def _measured_again(
    record: TensorRecord,
    state: Mapping[str, Tensor],
    trimmed: Trimmed,
    hessians: Mapping[str, Tensor] | None,
) -> TensorRecord:
    """What storing a tensor costs once some of its ones are gone."""
    if record.name not in trimmed.names:
        return record
    weight = state[record.name]
    error = weight - restore(trimmed.stored[record.name]).to(weight.device)
    output = record.hessian_error
    if output is not None and hessians is not None:
        hessian = hessians[record.name]
        output = float(row_errors(error.to(hessian.device), hessian).sum()) / error.numel()
    return replace(
        record,
        mse=float(error.square().mean(dtype=torch.float64)),
        max_error=float(error.abs().max()),
        hessian_error=output,
    )


def artifact_bytes(folder: Path) -> int:
    """Sum the sizes of all files under a folder; a symlink or special file is refused, because
    its size is not what would be submitted."""
    if not folder.is_dir() or folder.is_symlink():
        raise DataError(f"{folder}: not a folder; finalize the model again")
    total = 0
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode):
            total += status.st_size
        elif not stat.S_ISDIR(status.st_mode):
            raise DataError(f"{path}: neither a file nor a folder; remove it or copy it in")
    return total


def _checked(
    state: Mapping[str, Tensor], model: ModelSpec, device: torch.device
) -> dict[str, Tensor]:
    """Return what the model exports as float32 on a device, every entry of the state finite."""
    check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, model, "state")
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{name}: holds NaN or infinity; finalize another entry or train again")
    names = [size.name for size in tensor_sizes(blueprint(model.exported()))]
    return {name: state[name].detach().to(device, torch.float32) for name in names}


def _prune_large(
    state: Mapping[str, Tensor], tensors: Sequence[TensorSize], final: FinalSpec
) -> tuple[dict[str, Tensor], int]:
    """Zero the smallest entries where the spec says so; return the state and the count."""
    pruned, total = dict(state), 0
    if final.prune is None:
        return pruned, total
    for tensor in tensors:
        if is_pruned(tensor, final.prune):
            pruned[tensor.name] = prune(state[tensor.name], final.prune.ratio)
            total += num_pruned(tensor.numel, final.prune.ratio)
    return pruned, total
