"""Files as the public scripts write them, made from a model of ours."""

import io
import lzma
import zlib
from pathlib import Path
from typing import Any

import torch
import zstandard
from torch import Tensor

from trainer.blueprint import blueprint
from trainer.importer.names import public_tensors
from trainer.model.build import build
from trainer.specs.model import ModelSpec

COMPRESSORS = {
    "none": lambda content: content,
    "xz": lzma.compress,
    "lzma": lambda content: lzma.compress(content, format=lzma.FORMAT_ALONE),
    "zlib": zlib.compress,
    "zstd": lambda content: zstandard.ZstdCompressor(level=3).compress(content),
}


def random_state(spec: ModelSpec, seed: int = 0) -> dict[str, Tensor]:
    """Draw a state under the public names, every entry different from zero."""
    generator = torch.Generator().manual_seed(seed)
    return {
        tensor.name: torch.randn(tensor.shape, generator=generator)
        for tensor in public_tensors(blueprint(spec))
    }


def our_state(spec: ModelSpec, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put a public state under our names, as the built model has it."""
    shapes = {name: part.shape for name, part in build(spec).state_dict().items()}
    named = {tensor.ours: state[tensor.name] for tensor in public_tensors(blueprint(spec))}
    return {name: named[name].reshape(shape) for name, shape in shapes.items()}


def packed(content: Any, compressor: str = "none") -> bytes:
    """Save with torch and compress."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return COMPRESSORS[compressor](buffer.getvalue())


def write(path: Path, content: Any, compressor: str = "none") -> Path:
    """Write what `packed` gives."""
    path.write_bytes(packed(content, compressor))
    return path


def rows(weight: Tensor, levels: int, floor: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Quantize by row maxima on -levels..levels: (q int8, scale float16)."""
    scale = (weight.abs().amax(dim=1) / levels).clamp(min=floor).half()
    q = torch.round(weight / scale.float()[:, None]).clamp(-levels, levels)
    return q.to(torch.int8), scale


def mixed(state: dict[str, Tensor], bits: dict[str, int]) -> dict[str, Any]:
    """Store a public state as `{"w", "m"}`: the tensors of `bits` as integers, others float16."""
    weights: dict[str, Tensor] = {}
    meta: dict[str, Any] = {}
    for name, tensor in state.items():
        if name in bits:
            weights[f"{name}.q"], weights[f"{name}.scale"] = rows(tensor, 2 ** (bits[name] - 1) - 1)
            meta[name] = {"type": f"int{bits[name]}"}
        else:
            weights[name], meta[name] = tensor.half(), "passthrough"
    return {"w": weights, "m": meta}
