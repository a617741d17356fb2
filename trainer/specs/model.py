"""The model: width, depth and the parts a recipe may name. Techniques are cited in their modules.

A part that is None does not exist in the built model: no parameter, no branch, no byte.
"""

from typing import Literal

from trainer.specs.base import require, require_positive, spec


@spec
class Embedding:
    """The token table, also used as the output matrix (tied)."""

    init_std: float = 0.005

    def __post_init__(self) -> None:
        require_positive(init_std=self.init_std)


@spec
class Rope:
    """Rotary positions on the first `dims` dimensions of a head; all of them when absent."""

    dims: int | None = None
    base: float = 10_000.0

    def __post_init__(self) -> None:
        require_positive(dims=self.dims, base=self.base)
        require(self.dims is None or self.dims % 2 == 0, f"dims={self.dims} must be even")


@spec
class QGain:
    """A learned factor on each query head after the norm and the rotation."""

    init: float = 1.5


@spec
class Attention:
    """Causal grouped-query attention with RMS-normed queries and keys."""

    num_heads: int = 8
    num_kv_heads: int = 4
    rope: Rope = Rope()
    q_gain: QGain | None = None

    def __post_init__(self) -> None:
        require_positive(num_heads=self.num_heads, num_kv_heads=self.num_kv_heads)
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}",
        )


@spec
class Relu2:
    """max(0, x) squared."""

    kind: Literal["relu2"] = "relu2"


@spec
class LeakyRelu2:
    """Leaky ReLU squared: non-negative on both sides."""

    kind: Literal["leaky_relu2"] = "leaky_relu2"
    slope: float = 0.5


@spec
class Mlp:
    """Two matrices without bias; the hidden width is floor(mult * dim)."""

    mult: float = 2.0
    activation: Relu2 | LeakyRelu2 = Relu2()

    def __post_init__(self) -> None:
        require_positive(mult=self.mult)


@spec
class ResidualScale:
    """A learned vector on what attention and MLP add to the stream."""

    init: float = 1.0


@spec
class X0Mix:
    """A learned mix of the stream with the normed input embedding at each block's entry."""


@spec
class UNetSkips:
    """The first half of the layers hands its outputs, last in first out, to the second half."""

    init: float = 1.0


@spec
class Softcap:
    """Logits are squashed to cap * tanh(logits / cap)."""

    cap: float = 30.0

    def __post_init__(self) -> None:
        require_positive(cap=self.cap)


@spec
class OrthoInit:
    """Orthogonal matrices, except the output projections, which start at zero."""


@spec
class ModelSpec:
    """A decoder-only transformer over `vocab_size` tokens."""

    vocab_size: int
    num_layers: int
    dim: int
    embedding: Embedding = Embedding()
    attention: Attention = Attention()
    mlp: Mlp = Mlp()
    residual_scale: ResidualScale | None = None
    x0_mix: X0Mix | None = None
    unet: UNetSkips | None = None
    softcap: Softcap | None = None
    ortho_init: OrthoInit | None = None

    def __post_init__(self) -> None:
        require_positive(vocab_size=self.vocab_size, num_layers=self.num_layers, dim=self.dim)
        heads = self.attention.num_heads
        require(
            self.dim % heads == 0,
            f"attention.num_heads={heads} does not divide dim={self.dim}",
        )
        head_dim, rotated = self.dim // heads, self.attention.rope.dims
        require(
            rotated is None or rotated <= head_dim,
            f"attention.rope.dims={rotated} exceeds the head width {head_dim}",
        )
        require(head_dim % 2 == 0, f"the head width {head_dim} must be even")
        require(
            self.mlp.mult * self.dim >= 1,
            f"mlp.mult={self.mlp.mult} leaves no hidden unit at dim={self.dim}",
        )
