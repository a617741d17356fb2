"""The names that the public scripts give to our parameters. Pure.

Source: the state dicts of parameter-golf's train_gpt.py and of PRs #361, #414, #348, #951 and
#610, whose names agree where their parts do; SmearV2 and skip gates as in #1851 and #1218.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from trainer.blueprint import Blueprint
from trainer.errors import UsageError
from trainer.sizes import tensor_sizes

# Ours: (public name, what each axis of the public shape counts). "1" is an axis that ours lacks.
_STEM: dict[str, tuple[str, str]] = {
    "embedding.weight": ("tok_emb.weight", "vocab dim"),
    "skips.scale": ("skip_weights", "skips dim"),
    "skips.gate": ("skip_gates", "skips dim"),
    "smear.gate": ("smear.gate", "dim"),
    "smear.strength": ("smear_lambda", "1"),
    "smear.weight": ("smear_gate.weight", "1 smear"),
    "bigram.scale": ("bigram.scale", ""),
    "bigram.table.weight": ("bigram.embed.weight", "bigram_buckets bigram_dim"),
    "bigram.projection.weight": ("bigram.proj.weight", "dim bigram_dim"),
    "trigram.scale": ("trigram.scale", ""),
    "trigram.table.weight": ("trigram.embed.weight", "trigram_buckets trigram_dim"),
    "trigram.projection.weight": ("trigram.proj.weight", "dim trigram_dim"),
    "value_embedding.scale": ("ve_shared.scale", ""),
    "value_embedding.table.weight": ("ve_shared.embed.weight", "vocab value_dim"),
    "value_embedding.projection.weight": ("ve_shared.proj.weight", "kv value_dim"),
    "head.output.weight": ("lm_head.weight", "vocab dim"),
}
_BLOCK: dict[str, tuple[str, str]] = {
    "attention_scale.scale": ("attn_scale", "dim"),
    "mlp_scale.scale": ("mlp_scale", "dim"),
    "x0_mix.mix": ("resid_mix", "two dim"),
    "dtg.weight": ("dtg_gate.weight", "1 dim"),
    "dtg.bias": ("dtg_gate.bias", "1"),
    "attention.q_gain.gain": ("attn.q_gain", "heads"),
    "attention.query.weight": ("attn.c_q.weight", "dim dim"),
    "attention.key.weight": ("attn.c_k.weight", "kv dim"),
    "attention.value.weight": ("attn.c_v.weight", "kv dim"),
    "attention.out.weight": ("attn.proj.weight", "dim dim"),
    "mlp.up.weight": ("mlp.fc.weight", "hidden dim"),
    "mlp.gate.weight": ("mlp.gate.weight", "hidden dim"),
    "mlp.down.weight": ("mlp.proj.weight", "dim hidden"),
}
_PREFIXES = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before


@dataclass(frozen=True, slots=True)
class PublicTensor:
    """One parameter: its public name, shape and axes, and our name and shape for it."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    ours: str
    our_shape: tuple[int, ...]


def public_tensors(plan: Blueprint) -> tuple[PublicTensor, ...]:
    """List the model's parameters under their public names, in our state-dict order.

    UsageError when the model has a parameter that no public script stores.
    """
    users = [layer.index for layer in plan.layers if layer.uses_value_embedding]
    found = []
    for size in tensor_sizes(plan):
        name, axes = _public(size.name, users)
        # The scripts' one-row linear layers are vectors here, and one-entry vectors scalars.
        shape = (1,) * axes.count("1") + size.shape
        found.append(PublicTensor(name, shape, axes, size.name, size.shape))
    return tuple(found)


def shared_copies(plan: Blueprint) -> dict[str, str]:
    """Map the names under which a public state may repeat shared keys and values to their owner's.

    The scripts register the first layer's matrices again in every layer that shares them.
    """
    return {
        f"blocks.{layer.index}.attn.{part}.weight": f"blocks.{layer.kv_owner}.attn.{part}.weight"
        for layer in plan.layers
        if layer.kv_owner != layer.index
        for part in ("c_k", "c_v")
    }


def common_prefix(names: Iterable[str]) -> str:
    """Return the wrapper's prefix that all names carry, such as `module.`; empty without one."""
    rest, prefix = list(names), ""
    while rest:
        wrapper = next((p for p in _PREFIXES if all(name.startswith(p) for name in rest)), "")
        if not wrapper:
            break
        prefix += wrapper
        rest = [name.removeprefix(wrapper) for name in rest]
    return prefix


def _public(ours: str, value_users: list[int]) -> tuple[str, tuple[str, ...]]:
    first, _, rest = ours.partition(".")
    if first == "blocks":
        layer, _, part = rest.partition(".")
        if part == "attention.value_mix.scale":
            return f"ve_layer_scales.{value_users.index(int(layer))}", ("one",)
        if part in _BLOCK:
            name, axes = _BLOCK[part]
            return f"blocks.{layer}.{name}", tuple(axes.split())
    elif first == "mtp":
        return f"mtp_heads.{rest.removeprefix('heads.')}", ("vocab", "dim")
    elif ours in _STEM:
        name, axes = _STEM[ours]
        return name, tuple(axes.split())
    raise UsageError(
        f"{ours}: no public script has such a parameter; name another recipe with --recipe"
    )
