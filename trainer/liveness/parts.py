"""Every optional part that a model names must change what the model says."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trainer.blueprint import blueprint
from trainer.liveness.probe import NUM_TOKENS, SEED, awake, losses, rule, text
from trainer.model.attention import Attention
from trainer.model.build import build
from trainer.model.gpt import GPT
from trainer.model.linear import Linear
from trainer.results import Rule
from trainer.specs.model import ModelSpec

MIN_EFFECT = 1e-6  # nats: what is left of a part that rounds away
# These narrow a part down. One that spans everything says no more than its absence would.
SCOPES = frozenset({"attention.rope.dims", "attention.xsa.last", "attention.shared_kv.last"})
# These say where training starts from, so they show in fresh weights only.
STARTS = frozenset({"ortho_init", "ortho_init.scaled_outputs"})


def flags(spec: ModelSpec) -> Rule:
    """Taking any one optional part away changes the loss of the same weights."""
    effects = {path: effect(spec, path) for path in optional_parts(spec)}
    judged = {path: change for path, change in effects.items() if change is not None}
    faults = [
        f"model.{path} changes no loss (by {change:.1g} nats)"
        for path, change in judged.items()
        if not change > MIN_EFFECT
    ]
    shown = ", ".join(f"{path} {change:.1g}" for path, change in judged.items())
    return rule("flags", faults, f"nats that each part moves a loss by: {shown or 'no parts'}")


def optional_parts(value: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted paths of what a spec names or switches on and could do without."""
    for field in fields(value):
        part = getattr(value, field.name)
        if part is None:
            continue
        if field.default is None or part is True:
            yield f"{prefix}{field.name}"
        if is_dataclass(part):
            yield from optional_parts(part, f"{prefix}{field.name}.")


def effect(spec: ModelSpec, path: str) -> float | None:
    """Return the largest change of a loss, in nats, when the part at `path` is taken away.

    None where the model without it is the same one, or one that cannot be. What training starts
    from is judged by the largest change of a fresh weight.
    """
    try:
        other = _without(spec, path)
    except ValueError:
        return None
    if path in SCOPES and replace(blueprint(other), spec=spec) == blueprint(spec):
        return None
    if path in STARTS:
        return _fresh_change(spec, other)
    tokens = text(spec, _num_tokens(spec, path))
    model = awake(spec)
    rest = awake(other, _shared(model) | model.state_dict())
    if path == "attention.shared_kv":
        _move_owners(spec, model, rest)
    if path == "mtp":
        model.train()
        rest.train()
    return float((losses(model, tokens) - losses(rest, tokens)).abs().max())


def _without(value: Any, path: str) -> Any:
    head, _, rest = path.partition(".")
    part = getattr(value, head)
    return replace(
        value, **{head: _without(part, rest) if rest else False if part is True else None}
    )


def _shared(model: GPT) -> dict[str, Tensor]:
    """Return a copy of the key and value matrices for every layer that uses another's."""
    return {
        f"blocks.{layer.index}.attention.{name}.weight": linear.weight.detach()
        for layer in model.plan.layers
        for name, linear in zip(("key", "value"), _key_value(model, layer.index), strict=True)
    }


@torch.no_grad()
def _move_owners(spec: ModelSpec, *models: GPT) -> None:
    """Move the keys and values that layers share: with copies instead, only the owners follow."""
    for model in models:
        for owner in sorted({layer.kv_owner for layer in blueprint(spec).layers}):
            for linear in _key_value(model, owner):
                linear.weight.neg_()


def _key_value(model: GPT, layer: int) -> tuple[Linear, Linear]:
    attention = model.get_submodule(f"blocks.{layer}.attention")
    assert isinstance(attention, Attention)
    return attention.key_value


def _num_tokens(spec: ModelSpec, path: str) -> int:
    """Return a length at which the part acts: the NTK rule does beyond its reference only."""
    reference = spec.attention.rope.ntk_reference
    if path == "attention.rope.ntk_reference" and reference is not None:
        return reference + reference // 4 + 2
    return NUM_TOKENS


def _fresh_change(spec: ModelSpec, other: ModelSpec) -> float:
    """Return the largest difference between the weights that two models start from."""
    fresh, plain = (build(each, seed=SEED).state_dict() for each in (spec, other))
    return max(float((fresh[name] - plain[name]).abs().max()) for name in fresh if name in plain)
