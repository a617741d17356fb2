"""Evaluation: how an artifact is scored."""

from typing import Literal

from trainer.specs.base import require, require_positive, spec
from trainer.specs.documents import Documents
from trainer.specs.kernels import AttentionKernel
from trainer.specs.ttt import LoraTtt, OracleTtt, SgdTtt


@spec
class EvaluateSpec:
    """Sliding windows of `window` tokens, `stride` predictions scored in each after the first.

    Variant C scores every prediction exactly once; A re-scores the tail of the stream as the
    public scripts do, for the reproduction of old logs. stride = window means no overlap.
    With `documents` the windows slide inside each document, `stride` being the chunk. `ttt` adapts
    the model to what is already scored; an oracle adapts before, and is never legal.
    """

    window: int
    stride: int
    variant: Literal["A", "C"] = "C"
    batch_windows: int = 16
    attention: AttentionKernel | None = None
    """Which implementation computes the attention; torch's choice when absent."""
    compile: bool = False
    """Whether the batches of the commonest shape are scored with a compiled graph; pays on long
    texts. Rounds differently, and its compilation is on the clock."""
    fused: bool = False
    """Whether heads and MLP are computed by our own kernels, as `train.fused` has it. Pays beside
    `compile`, whose graph has the rest in one pass already."""
    documents: Documents | None = None
    ttt: LoraTtt | SgdTtt | OracleTtt | None = None

    def __post_init__(self) -> None:
        require_positive(window=self.window, stride=self.stride, batch_windows=self.batch_windows)
        require(
            self.stride <= self.window,
            f"stride={self.stride} exceeds window={self.window}: predictions would be skipped",
        )
        require(
            self.variant == "C" or (self.documents is None and self.ttt is None),
            "variant=A reproduces plain old logs; leave documents and ttt out or set variant=C",
        )
        is_lora = isinstance(self.ttt, LoraTtt)
        require(
            not is_lora or self.documents is not None,
            "ttt.kind=lora adapts per document; add documents: {}",
        )
        require(
            self.ttt is None or is_lora or self.documents is None,
            f"ttt.kind={self.ttt and self.ttt.kind} reads one stream; leave documents out",
        )
        for name in ("compile", "fused"):
            require(
                not getattr(self, name) or self.ttt is None or isinstance(self.ttt, OracleTtt),
                f"{name}=True is for a model that stays as it is; leave it out, or leave out "
                f"ttt.kind={self.ttt and self.ttt.kind}, which trains between scores",
            )
