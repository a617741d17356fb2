"""What a recipe says of a model and no tensor of a file can confirm. Pure."""

from typing import Any

from trainer.codec import flatten
from trainer.specs.model import ModelSpec, SmearV1, SwiGlu

ABSENT = "null"


def unseen(spec: ModelSpec) -> dict[str, Any]:
    """The values, by recipe path, that an import has to take on trust. "null" is an absent one."""
    attention = spec.attention
    found: dict[str, Any] = {}
    if not isinstance(spec.mlp.activation, SwiGlu):  # which has a matrix of its own
        found |= flatten(spec.mlp.activation, "model.mlp.activation")
    for name in ("dims", "base", "ntk_reference"):
        found[f"model.attention.rope.{name}"] = _shown(getattr(attention.rope, name))
    if attention.q_gain is None:
        found["model.attention.num_heads"] = attention.num_heads
    found |= _part("model.attention.xsa", attention.xsa)
    found |= _part("model.ln_scale", spec.ln_scale)
    found |= _part("model.recurrence", spec.recurrence)
    found |= _part("model.softcap", spec.softcap)
    if isinstance(spec.smear, SmearV1):
        found["model.smear.before_norm"] = spec.smear.before_norm
    elif spec.smear is not None:
        found["model.smear.bos"] = spec.smear.bos
    return found


def line(values: dict[str, Any]) -> str:
    """The values as they are written after -S."""
    pairs = ", ".join(f"{path}={_written(value)}" for path, value in values.items())
    return f"no tensor tells these, check them: {pairs}"


def _part(path: str, part: object) -> dict[str, Any]:
    """A part's values; of one that has none set, that it is there."""
    if part is None:
        return {path: ABSENT}
    values = flatten(part, path)
    return {path: "{}"} if values == {path: True} else values


def _shown(value: object) -> object:
    return ABSENT if value is None else value


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
