"""Every optional part that a model names must change what the model says."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from trainer.blueprint import blueprint
from trainer.liveness.probe import NUM_TOKENS, SEED, awake, losses, rule, text
from trainer.model.build import build
from trainer.results import Rule
from trainer.specs.model import ModelSpec

MIN_EFFECT = 1e-6  # nats: what is left of a part that rounds away
# These narrow a part down. One that spans everything says no more than its absence would.
SCOPES = frozenset({"attention.rope.dims", "attention.xsa.last", "attention.shared_kv.last"})


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
    """Yield the dotted paths of what a spec names and could do without."""
    for field in fields(value):
        part = getattr(value, field.name)
        if part is None:
            continue
        if field.default is None:
            yield f"{prefix}{field.name}"
        if is_dataclass(part):
            yield from optional_parts(part, f"{prefix}{field.name}.")


def effect(spec: ModelSpec, path: str) -> float | None:
    """Return the largest change of a loss, in nats, when the part at `path` is taken away.

    None where the model without it is the same one, or one that cannot be. `ortho_init` is
    judged by the largest change of a fresh weight.
    """
    try:
        other = _without(spec, path)
    except ValueError:
        return None
    if path in SCOPES and replace(blueprint(other), spec=spec) == blueprint(spec):
        return None
    if path == "ortho_init":
        return _fresh_change(spec, other)
    tokens = text(spec, _num_tokens(spec, path))
    model = awake(spec)
    rest = awake(other, model.state_dict())
    if path == "mtp":
        model.train()
        rest.train()
    return float((losses(model, tokens) - losses(rest, tokens)).abs().max())


def _without(value: Any, path: str) -> Any:
    head, _, rest = path.partition(".")
    return replace(value, **{head: _without(getattr(value, head), rest) if rest else None})


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
