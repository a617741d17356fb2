"""Finalization: which average, how it is pruned, quantized and compressed."""

import re
from typing import Literal

from trainer.specs.base import require, require_fraction, require_positive, spec

# Row clips tried by the named searches: quantiles of |w| (p…) or ratios of the row maximum (r…).
CLIP_CANDIDATES: dict[str, tuple[float, ...]] = {
    "p3": (0.999, 0.9999, 1.0),
    "p5": (0.999, 0.9995, 0.9999, 0.99999, 1.0),  # parameter-golf PR #414
    "p9": (0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999, 0.99999, 1.0),
    "r9": (0.80, 0.85, 0.90, 0.93, 0.95, 0.97, 0.98, 0.99, 1.0),  # parameter-golf PR #951
}
_SD_CLIP = re.compile(r"sd(\d+(\.\d+)?)")


def sd_clip(clip: str) -> float | None:
    """Return k of a clip at k standard deviations of the row (`sd12`), None for other clips."""
    match = _SD_CLIP.fullmatch(clip)
    return float(match[1]) if match else None


@spec
class Prune:
    """Zero the smallest `ratio` of each matrix by magnitude, before quantization."""

    ratio: float = 0.03

    def __post_init__(self) -> None:
        require_fraction(ratio=self.ratio)


@spec
class Quantize:
    """Integers per row: bits by role, and how a row's clip is found.

    clip: `none` takes the row maximum; p3 p5 p9 try quantiles of |w| and r9 ratios of the row
    maximum, keeping per row the one with the least squared error; `sd<k>` clips at k standard
    deviations. `float_numel`: tensors of at most so many elements are stored as float16.
    """

    matrix_bits: int = 6
    embed_bits: int = 8
    clip: str = "none"
    scale_floor: float = 1e-12
    float_numel: int = 65_536

    def __post_init__(self) -> None:
        for name in ("matrix_bits", "embed_bits"):
            bits = getattr(self, name)
            require(2 <= bits <= 8, f"{name}={bits} is outside 2..8")
        known = ("none", *CLIP_CANDIDATES)
        k = sd_clip(self.clip)
        require(
            self.clip in known or (k is not None and k > 0),
            f"clip={self.clip!r} is not one of {', '.join(known)} or sd<k>, such as sd12",
        )
        require_positive(scale_floor=self.scale_floor)
        require(self.float_numel >= 0, f"float_numel={self.float_numel} is below 0")


@spec
class Zstd:
    """One zstd frame with size and checksum. Never replaced by another compressor."""

    kind: Literal["zstd"] = "zstd"
    level: int = 22

    def __post_init__(self) -> None:
        require(1 <= self.level <= 22, f"level={self.level} is outside 1..22")


@spec
class FinalSpec:
    """From a bank entry to an artifact."""

    average: Literal["raw", "ema", "swa"] = "raw"
    prune: Prune | None = None
    quantize: Quantize = Quantize()
    compress: Zstd = Zstd()
