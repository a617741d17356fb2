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
LARGEST_SCALE = 65_504.0  # scales are stored as float16
MAX_RANK = 64  # of a low-rank repair: restoring takes time in proportion
_SD_CLIP = re.compile(r"sd(\d+(\.\d+)?)")


def sd_clip(clip: str) -> float | None:
    """Return k of a clip at k standard deviations of the row (`sd12`), None for other clips."""
    match = _SD_CLIP.fullmatch(clip)
    return float(match[1]) if match else None


def _check_clip(name: str, clip: str) -> None:
    known = ("none", *CLIP_CANDIDATES)
    k = sd_clip(clip)
    require(
        clip in known or (k is not None and k > 0),
        f"{name}={clip!r} is not one of {', '.join(known)} or sd<k>, such as sd12",
    )


@spec
class Prune:
    """Zero the smallest `ratio` of each matrix by magnitude, before quantization.

    Only matrices of more than `larger_than` entries; `tables` prunes the embedding tables too.
    """

    ratio: float = 0.03
    tables: bool = False
    larger_than: int = 65_536

    def __post_init__(self) -> None:
        require_fraction(ratio=self.ratio)
        require(self.larger_than >= 0, f"larger_than={self.larger_than} is below 0")


@spec
class Bits:
    """Bits per entry by class: 2 to 8 are integers with row scales, 16 is float16.

    hash: the bigram and trigram tables and their projections. embed: the token table and an
    untied head. other: the value embedding and its projection.
    """

    mlp: int = 6
    attention: int = 6
    hash: int = 8
    embed: int = 8
    other: int = 8
    scalar: Literal[16, 32] = 32

    def __post_init__(self) -> None:
        for name in ("mlp", "attention", "hash", "embed", "other"):
            bits = getattr(self, name)
            require(2 <= bits <= 8 or bits == 16, f"{name}={bits} is neither in 2..8 nor 16")


@spec
class Int8Rule:
    """The public baseline's own rule for tensors of 8 bits, instead of `clip` and `scale_floor`:
    rows clipped at a high quantile, rounded by the scale as it is before float16."""

    quantile: float = 0.9999984
    scale_floor: float = 1 / 127

    def __post_init__(self) -> None:
        require(0.0 < self.quantile <= 1.0, f"quantile={self.quantile} is outside (0, 1]")
        require_positive(scale_floor=self.scale_floor)


@spec
class Clips:
    """Row clips by class of tensor, where a class does not take the common `clip`."""

    mlp: str | None = None
    attention: str | None = None
    hash: str | None = None
    embed: str | None = None
    other: str | None = None

    def __post_init__(self) -> None:
        for name in ("mlp", "attention", "hash", "embed", "other"):
            clip = getattr(self, name)
            if clip is not None:
                _check_clip(name, clip)


@spec
class Gptq:
    """Rounding that lets later columns make up for the errors of earlier ones.

    The Hessian XᵀX of a layer's inputs comes from `sequences` sequences of `seq_len` tokens:
    training batches, or text `generated` by the model itself at `temperature`. `damping` is the
    share of the mean diagonal that is added; it grows tenfold until the factorisation succeeds.
    `embeddings`: the token table too, by the inputs of the output head. `row_importance` is λ of
    the Hessian-aware clip k σ (1 + λ (ρ - 1)).

    Source: Frantar et al. 2022 (arXiv 2210.17323); parameter-golf PRs #1019, #1394 and #1855
    (techniques 2.24, 4.3).
    """

    calibration: Literal["train", "generated"] = "train"
    sequences: int = 64
    seq_len: int = 2048
    temperature: float = 0.8
    seed: int = 0
    block: int = 128
    damping: float = 0.01
    act_order: bool = True
    embeddings: bool = True
    row_importance: float | None = None

    def __post_init__(self) -> None:
        require_positive(
            sequences=self.sequences,
            seq_len=self.seq_len,
            temperature=self.temperature,
            block=self.block,
            damping=self.damping,
        )
        require(
            self.row_importance is None or 0.0 < self.row_importance <= 1.0,
            f"row_importance={self.row_importance} is outside (0, 1]",
        )


@spec
class Lqer:
    """Low-rank repair of the worst quantized matrices: W ≈ W_q + A B.

    A of `rank` columns in 2 bits, B in 4 bits by groups of 64, from the SVD of the error.

    Source: parameter-golf PR #1855 (techniques 4.3-23).
    """

    tensors: int = 3
    rank: int = 4

    def __post_init__(self) -> None:
        require_positive(tensors=self.tensors, rank=self.rank)
        require(self.rank <= MAX_RANK, f"rank={self.rank} exceeds {MAX_RANK}")


@spec
class Quantize:
    """Integers per row: bits by class, and how a row's clip is found.

    clip: `none` takes the row maximum; p3 p5 p9 try quantiles of |w| and r9 ratios of the row
    maximum; `sd<k>` clips at k standard deviations. Of several candidates the one with the least
    squared error is kept, `clip_scope` by row or one for the whole matrix. A grid is -R..R, or
    -R-1..R when not `symmetric`. `float_numel`: tensors of at most so many elements are stored as
    float16. `float16_keys`: layers whose key projection is, too.
    """

    bits: Bits = Bits()
    clip: str = "none"
    clips: Clips = Clips()
    clip_scope: Literal["row", "matrix"] = "row"
    scale_floor: float = 1e-12
    symmetric: bool = True
    int8: Int8Rule | None = None
    float_numel: int = 65_536
    float16_keys: tuple[int, ...] = ()
    gptq: Gptq | None = None
    lqer: Lqer | None = None

    def __post_init__(self) -> None:
        _check_clip("clip", self.clip)
        require_positive(scale_floor=self.scale_floor)
        require(
            self.scale_floor <= LARGEST_SCALE,
            f"scale_floor={self.scale_floor} exceeds {LARGEST_SCALE:g}, the largest float16",
        )
        require(self.float_numel >= 0, f"float_numel={self.float_numel} is below 0")
        parts = ("mlp", "attention", "hash", "embed", "other")
        require(
            self.gptq is None
            or self.gptq.row_importance is None
            or any(sd_clip(self.clip_of(part)) for part in parts),
            "gptq.row_importance moves a clip of row deviations, and no class has one; "
            "set clip=sd<k> or leave it out",
        )

    def clip_of(self, part: str) -> str:
        """The clip of a class of tensors: its own, or the common one."""
        return getattr(self.clips, part) or self.clip


@spec
class TrimOnes:
    """Zero integers of ±1, those of the smallest scales first, until the weights file holds at
    most `weights_bytes`. Source: parameter-golf PR #609 (techniques 2.25)."""

    weights_bytes: int

    def __post_init__(self) -> None:
        require_positive(weights_bytes=self.weights_bytes)


@spec
class Zstd:
    """One zstd frame with size and checksum. Never replaced by another compressor.

    `long_distance` lets zstd look for repeats over the level's own window, or one of
    2 ** `window_log` bytes; without it the search is kept short.
    """

    kind: Literal["zstd"] = "zstd"
    level: int = 22
    long_distance: bool = False
    window_log: int | None = None

    def __post_init__(self) -> None:
        require(1 <= self.level <= 22, f"level={self.level} is outside 1..22")
        require(
            self.window_log is None or 10 <= self.window_log <= 27,
            f"window_log={self.window_log} is outside 10..27",
        )
        require(
            self.window_log is None or self.long_distance,
            f"window_log={self.window_log} needs long_distance: true",
        )


@spec
class Brotli:
    """One brotli stream. Never replaced by another compressor."""

    kind: Literal["brotli"] = "brotli"
    level: int = 11

    def __post_init__(self) -> None:
        require(0 <= self.level <= 11, f"level={self.level} is outside 0..11")


@spec
class Lzma:
    """One xz stream with a check. Never replaced by another compressor."""

    kind: Literal["lzma"] = "lzma"
    level: int = 9

    def __post_init__(self) -> None:
        require(0 <= self.level <= 9, f"level={self.level} is outside 0..9")


@spec
class Zlib:
    """One zlib stream. Never replaced by another compressor."""

    kind: Literal["zlib"] = "zlib"
    level: int = 9

    def __post_init__(self) -> None:
        require(1 <= self.level <= 9, f"level={self.level} is outside 1..9")


@spec
class RangeCoder:
    """Our own coder: every integer by the scale of its row and of its column, in a range coder."""

    kind: Literal["range"] = "range"


Compress = Zstd | Brotli | Lzma | Zlib | RangeCoder


@spec
class FinalSpec:
    """From a bank entry to an artifact. `code`: the counted code as a plain zip, or packed."""

    average: Literal["raw", "ema", "swa"] = "raw"
    prune: Prune | None = None
    quantize: Quantize = Quantize()
    trim_ones: TrimOnes | None = None
    compress: Compress = Zstd()
    code: Literal["zip", "packed"] = "zip"
