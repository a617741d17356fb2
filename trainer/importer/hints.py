"""What the tensors of a public file say about the recipe that fits them. Pure.

A fault of one tensor is answered with the recipe fields that would make it fit, read off the
names and shapes of the whole file.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping

from trainer.importer.names import PublicTensor
from trainer.specs.model import ModelSpec, SharedKv, SmearV1, SmearV2, SwiGlu

Shapes = Mapping[str, tuple[int, ...]]
Settings = tuple[str, ...]
Rule = Callable[[Shapes, ModelSpec], Settings]

_BLOCK = re.compile(r"blocks\.(\d{1,6})\.(.+)")
_IMPOSSIBLE = re.compile(r".*=(0|-.*)|.*\.num_buckets=1")


def settings_for_shape(wanted: PublicTensor, shapes: Shapes, spec: ModelSpec) -> Settings:
    """Name the fields that would give a tensor the shape that the file has."""
    got = shapes[wanted.name]
    if len(got) != len(wanted.shape):
        return ()
    differing = [axis for axis, a, b in zip(wanted.axes, got, wanted.shape, strict=True) if a != b]
    sizes = dict(zip(wanted.axes, got, strict=True))
    found: list[str] = []
    for axis in differing:
        found += _axis_settings(axis, sizes[axis], shapes, spec)
    return _possible(found)


def settings_for_part(name: str, shapes: Shapes, spec: ModelSpec) -> Settings:
    """Name the fields that would make a missing tensor needless, or find an extra one its place."""
    block = _BLOCK.fullmatch(name)
    if block is not None:
        layers = _num_layers(shapes, spec)
        if layers != spec.num_layers and int(block[1]) >= min(layers, spec.num_layers):
            return _possible(_layer_settings(layers, shapes, spec))
    part = block[2] if block is not None else name
    for start, settings in _PARTS.items():
        if part.startswith(start):
            return _possible(settings(shapes, spec))
    return ()


def _possible(settings: Iterable[str]) -> Settings:
    """Each setting once. Of a setting that no recipe takes, none: the file is not what it seems."""
    once = tuple(dict.fromkeys(settings))
    return () if any(_IMPOSSIBLE.fullmatch(setting) for setting in once) else once


def _num_layers(shapes: Shapes, spec: ModelSpec) -> int:
    """The file's layers, if it has all from 0 on; else it does not tell, and the recipe's stand."""
    found = {int(block[1]) for name in shapes if (block := _BLOCK.fullmatch(name))}
    return len(found) if found and max(found) == len(found) - 1 else spec.num_layers


def _layer_settings(layers: int, shapes: Shapes, spec: ModelSpec) -> Settings:
    """The number of layers, and of what counts layers what would exceed it."""
    found = [f"model.num_layers={layers}"]
    xsa, values, again = spec.attention.xsa, spec.value_embedding, spec.recurrence
    shared = spec.attention.shared_kv
    if xsa is not None and xsa.last is not None and xsa.last > layers:
        found.append(f"model.attention.xsa.last={layers}")
    if values is not None and values.last > layers:
        found += _value_embedding(shapes, spec)
    if shared is not None and 2 * (shared.last or 1) > layers:
        found += _shared_kv(shapes, spec)
    if again is not None and again.last >= layers:
        found.append("model.recurrence=null")
    return tuple(found)


def _axis_settings(axis: str, size: int, shapes: Shapes, spec: ModelSpec) -> Settings:
    match axis:
        case "dim" | "heads" | "kv":
            return _width_settings(shapes, spec, size if axis == "kv" else None)
        case "vocab":
            return (f"model.vocab_size={size}",)
        case "skips":  # follows from the layers
            layers = _num_layers(shapes, spec)
            return () if layers == spec.num_layers else _layer_settings(layers, shapes, spec)
        case "smear":
            return (f"model.smear.width={size}",)
        case "value_dim":
            return (f"model.value_embedding.dim={size}",)
        case "hidden":
            dim, _ = _width(shapes, spec)
            return () if size == int(spec.mlp.mult * dim) else (_mult(size, dim),)
    table, _, field = axis.partition("_")
    if field in ("buckets", "dim"):
        return (f"model.{table}.{'num_buckets' if field == 'buckets' else 'dim'}={size}",)
    return ()


def _width(shapes: Shapes, spec: ModelSpec) -> tuple[int, int]:
    """The file's own width and head count: what its other sizes are multiples of."""
    table = shapes.get("tok_emb.weight", ())
    gain = shapes.get("blocks.0.attn.q_gain", ())
    dim = table[1] if len(table) == 2 else 0
    heads = gain[0] if len(gain) == 1 else 0
    return dim or spec.dim, heads or spec.attention.num_heads


def _width_settings(shapes: Shapes, spec: ModelSpec, kv: int | None) -> Settings:
    """Width, heads and what follows from both, together: one alone would not parse.

    `kv` counts the rows of a key projection; the file's first one by default.
    """
    dim, heads = _width(shapes, spec)
    attention, found = spec.attention, []
    if dim != spec.dim:
        found.append(f"model.dim={dim}")
    if heads != attention.num_heads:
        found.append(f"model.attention.num_heads={heads}")
    if kv is None:
        keys = (s for name, s in shapes.items() if name.endswith(".attn.c_k.weight") and s)
        kv = next(keys, (0,))[0]
    kv_heads = kv * heads // dim if kv * heads % dim == 0 else 0
    if kv_heads and heads % kv_heads == 0 and kv_heads != attention.num_kv_heads:
        found.append(f"model.attention.num_kv_heads={kv_heads}")
    rope = attention.rope.dims
    if found and rope is not None and dim % heads == 0 and rope > dim // heads:
        found.append(f"model.attention.rope.dims={dim // heads}")
    return tuple(found)


def _mult(size: int, dim: int) -> str:
    """The shortest factor that gives the hidden width to the unit."""
    factor = size / dim
    short = f"{factor:g}"
    if int(float(short) * dim) == size:
        return f"model.mlp.mult={short}"
    while int(factor * dim) < size:
        factor = math.nextafter(factor, math.inf)
    return f"model.mlp.mult={factor!r}"


def _holds(shapes: Shapes, part: str) -> bool:
    return part in shapes or any(
        block[2].startswith(part) for name in shapes if (block := _BLOCK.fullmatch(name))
    )


def _optional(path: str, sign: str, value: Callable[[ModelSpec], object]) -> Rule:
    """A part of the recipe without sizes: it is there where the file has the tensor `sign`."""

    def settings(shapes: Shapes, spec: ModelSpec) -> Settings:
        there = _holds(shapes, sign)
        if there == (value(spec) is not None):
            return ()
        return (f"{path}={'{}' if there else 'null'}",)

    return settings


def _hash_table(name: str) -> Rule:
    def settings(shapes: Shapes, spec: ModelSpec) -> Settings:
        table = shapes.get(f"{name}.embed.weight", ())
        if len(table) != 2:
            return (f"model.{name}=null",)
        if getattr(spec, name) is not None:
            return ()
        return (f"model.{name}.num_buckets={table[0]}", f"model.{name}.dim={table[1]}")

    return settings


def _smear(shapes: Shapes, spec: ModelSpec) -> Settings:
    if "smear_lambda" in shapes:
        return () if isinstance(spec.smear, SmearV2) else ("model.smear.kind=v2",)
    if "smear.gate" in shapes:
        return () if isinstance(spec.smear, SmearV1) else ("model.smear.kind=v1",)
    return ("model.smear=null",)


def _value_embedding(shapes: Shapes, spec: ModelSpec) -> Settings:
    table = shapes.get("ve_shared.embed.weight", ())
    if len(table) != 2:
        return ("model.value_embedding=null",)
    users = sum(name.startswith("ve_layer_scales.") for name in shapes)
    now = spec.value_embedding
    dim = () if now is not None else (f"model.value_embedding.dim={table[1]}",)
    last = () if now is not None and now.last == users else (f"model.value_embedding.last={users}",)
    return dim + last


def _shared_kv(shapes: Shapes, spec: ModelSpec) -> Settings:
    owners = [name for name in shapes if name.endswith(".attn.c_k.weight")]
    borrowers = _num_layers(shapes, spec) - len(owners)
    now = spec.attention.shared_kv
    if borrowers <= 0:
        return () if now is None else ("model.attention.shared_kv=null",)
    fitting = SharedKv() if len(owners) == 1 else SharedKv(last=borrowers)
    if now == fitting:
        return ()
    return ("model.attention.shared_kv" + ("={}" if len(owners) == 1 else f".last={borrowers}"),)


def _gated_mlp(shapes: Shapes, spec: ModelSpec) -> Settings:
    there = _holds(shapes, "mlp.gate")
    if there == isinstance(spec.mlp.activation, SwiGlu):
        return ()
    return (f"model.mlp.activation.kind={'swiglu' if there else 'relu2'}",)


def _mtp(shapes: Shapes, spec: ModelSpec) -> Settings:
    heads = sum(name.startswith("mtp_heads.") for name in shapes)
    if spec.mtp is not None and spec.mtp.num_heads == heads:
        return ()
    return (f"model.mtp.num_heads={heads}" if heads else "model.mtp=null",)


# Start of a public name, without its layer: what the file says about the part it belongs to.
_PARTS: dict[str, Rule] = {
    "skip_weights": _optional("model.unet", "skip_weights", lambda spec: spec.unet),
    "skip_gates": _optional("model.unet.gate", "skip_gates", lambda s: s.unet and s.unet.gate),
    "smear": _smear,
    "bigram.": _hash_table("bigram"),
    "trigram.": _hash_table("trigram"),
    "ve_": _value_embedding,
    "lm_head.": _optional("model.head", "lm_head.weight", lambda spec: spec.head),
    "mtp_heads.": _mtp,
    "attn_scale": _optional("model.residual_scale", "attn_scale", lambda s: s.residual_scale),
    "mlp_scale": _optional("model.residual_scale", "mlp_scale", lambda s: s.residual_scale),
    "resid_mix": _optional("model.x0_mix", "resid_mix", lambda spec: spec.x0_mix),
    "dtg_gate.": _optional("model.dtg", "dtg_gate.", lambda spec: spec.dtg),
    "attn.q_gain": _optional("model.attention.q_gain", "attn.q_gain", lambda s: s.attention.q_gain),
    "attn.c_k": _shared_kv,
    "attn.c_v": _shared_kv,
    "mlp.gate": _gated_mlp,
}
