"""What the tensors of a public file say about the recipe that fits them. Pure.

A fault of one tensor is answered with the recipe fields that would make it fit, read off the
names and shapes of the whole file.
"""

import re
from collections.abc import Callable, Mapping

from trainer.importer.names import PublicTensor
from trainer.specs.model import ModelSpec, SharedKv, SmearV1, SmearV2, SwiGlu

Shapes = Mapping[str, tuple[int, ...]]
Settings = tuple[str, ...]
Rule = Callable[[Shapes, ModelSpec], Settings]

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


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
    return tuple(dict.fromkeys(found))


def settings_for_part(name: str, shapes: Shapes, spec: ModelSpec) -> Settings:
    """Name the fields that would make a missing tensor needless, or find an extra one its place."""
    block = _BLOCK.fullmatch(name)
    if block is not None:
        layers = _num_layers(shapes)
        if layers != spec.num_layers and int(block[1]) >= min(layers, spec.num_layers):
            return (f"model.num_layers={layers}",)
    part = block[2] if block is not None else name
    for start, settings in _PARTS.items():
        if part.startswith(start):
            return settings(shapes, spec)
    return ()


def _num_layers(shapes: Shapes) -> int:
    found = [int(block[1]) for name in shapes if (block := _BLOCK.fullmatch(name))]
    return 1 + max(found, default=-1)


def _axis_settings(axis: str, size: int, shapes: Shapes, spec: ModelSpec) -> list[str]:
    """The file's own width and head count are what its other sizes are multiples of."""
    dim = shapes.get("tok_emb.weight", (0, spec.dim))[-1] or spec.dim
    heads = shapes.get("blocks.0.attn.q_gain", (spec.attention.num_heads,))[0]
    heads = heads or spec.attention.num_heads
    match axis:
        case "dim":
            return [f"model.dim={size}"]
        case "vocab":
            return [f"model.vocab_size={size}"]
        case "heads":
            return [f"model.attention.num_heads={size}"]
        case "skips":  # follows from the layers
            layers = _num_layers(shapes)
            return [] if layers == spec.num_layers else [f"model.num_layers={layers}"]
        case "smear":
            return [f"model.smear.width={size}"]
        case "value_dim":
            return [f"model.value_embedding.dim={size}"]
        case "kv" if size * heads % dim == 0:
            same = size * heads // dim == spec.attention.num_kv_heads
            return [] if same else [f"model.attention.num_kv_heads={size * heads // dim}"]
        case "hidden":
            return [] if size == int(spec.mlp.mult * dim) else [f"model.mlp.mult={size / dim:g}"]
    table, _, field = axis.partition("_")
    if field in ("buckets", "dim"):
        return [f"model.{table}.{'num_buckets' if field == 'buckets' else 'dim'}={size}"]
    return []


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
    borrowers = _num_layers(shapes) - len(owners)
    now = spec.attention.shared_kv
    if borrowers == 0:
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
