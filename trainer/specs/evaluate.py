"""Evaluation: how an artifact is scored."""

from typing import Literal

from trainer.specs.base import require, require_positive, spec


@spec
class EvaluateSpec:
    """Sliding windows of `window` tokens, `stride` predictions scored in each after the first.

    Variant C scores every prediction exactly once; A re-scores the tail of the stream as the
    public scripts do, for the reproduction of old logs. stride = window means no overlap.
    """

    window: int
    stride: int
    variant: Literal["A", "C"] = "C"
    batch_windows: int = 16

    def __post_init__(self) -> None:
        require_positive(window=self.window, stride=self.stride, batch_windows=self.batch_windows)
        require(
            self.stride <= self.window,
            f"stride={self.stride} exceeds window={self.window}: predictions would be skipped",
        )
