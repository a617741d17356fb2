"""The one flavour of dataclass that configuration may use, and the checks its invariants share."""

from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def spec(cls: type[T]) -> type[T]:
    """Make `cls` a spec: frozen, slotted, keyword-only, closed to unknown keys and to NaN.

    The class attribute is what pydantic reads at the edge (`trainer.codec`), so that this
    package needs no import of it.
    """
    cls.__pydantic_config__ = {  # type: ignore[attr-defined]
        "extra": "forbid",
        "allow_inf_nan": False,
        "use_attribute_docstrings": True,
    }
    return dataclass(frozen=True, slots=True, kw_only=True)(cls)


def require(holds: bool, message: str) -> None:
    """Raise ValueError with `message` unless an invariant holds; the codec adds the path."""
    if not holds:
        raise ValueError(message)


def require_positive(**values: float | None) -> None:
    """Check that each named value that is given is above zero."""
    for name, value in values.items():
        require(value is None or value > 0, f"{name}={value} must be above 0")


def require_fraction(**values: float | None) -> None:
    """Check that each named value that is given lies in [0, 1)."""
    for name, value in values.items():
        require(value is None or 0.0 <= value < 1.0, f"{name}={value} is outside [0, 1)")
