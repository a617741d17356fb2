"""The model: width, depth and the parts a recipe may name. Techniques are cited in their modules.

A part that is None does not exist in the built model: no parameter, no branch, no byte.
"""

from dataclasses import replace
from typing import Literal

from trainer.specs.base import require, require_positive, spec


@spec
class Embedding:
    """The token table, also used as the output matrix unless the model names a `head`."""

    init_std: float = 0.005

    def __post_init__(self) -> None:
        require_positive(init_std=self.init_std)


@spec
class HashEmbedding:
    """A table of hashed token pairs or triples, projected to the width and added to the stem."""

    num_buckets: int
    dim: int
    scale_init: float = 0.05

    def __post_init__(self) -> None:
        require_positive(dim=self.dim)
        require(self.num_buckets >= 2, f"num_buckets={self.num_buckets} must be at least 2")


@spec
class SmearV1:
    """A learned blend of each position with the one before it, dimension by dimension.

    `init` is the logit of the share that the position before has: 0 is half, -3 is 5 %.
    """

    kind: Literal["v1"] = "v1"
    init: float = 0.0
    before_norm: bool = False


@spec
class SmearV2:
    """The position before is added by a gate on the first `width` dimensions, never across BOS."""

    kind: Literal["v2"] = "v2"
    width: int = 12
    bos: int = 1

    def __post_init__(self) -> None:
        require_positive(width=self.width)
        require(self.bos >= 0, f"bos={self.bos} is below 0")


@spec
class Rope:
    """Rotary positions on the first `dims` dimensions of a head; all of them when absent.

    With `ntk_reference`, sequences longer than it raise the base by the NTK rule.
    """

    dims: int | None = None
    base: float = 10_000.0
    ntk_reference: int | None = None

    def __post_init__(self) -> None:
        require_positive(dims=self.dims, base=self.base, ntk_reference=self.ntk_reference)
        require(self.dims is None or self.dims % 2 == 0, f"dims={self.dims} must be even")


@spec
class QGain:
    """A learned factor on each query head after the norm and the rotation."""

    init: float = 1.5


@spec
class Xsa:
    """Exclusive self attention in the last `last` layers, in all when absent."""

    last: int | None = None

    def __post_init__(self) -> None:
        require_positive(last=self.last)


@spec
class SharedKv:
    """Layers that use another layer's key and value matrices.

    Without `last`, every layer uses the first layer's; with it, each of the last `last` layers
    uses those of the layer `last` before it.
    """

    last: int | None = None

    def __post_init__(self) -> None:
        require_positive(last=self.last)


@spec
class Attention:
    """Causal grouped-query attention with RMS-normed queries and keys."""

    num_heads: int = 8
    num_kv_heads: int = 4
    rope: Rope = Rope()
    q_gain: QGain | None = None
    xsa: Xsa | None = None
    shared_kv: SharedKv | None = None

    def __post_init__(self) -> None:
        require_positive(num_heads=self.num_heads, num_kv_heads=self.num_kv_heads)
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}",
        )


@spec
class ValueEmbedding:
    """A second token table whose projection is added to the values of the last `last` layers."""

    dim: int = 128
    last: int = 2
    init_std: float = 0.01
    scale_init: float = 0.1

    def __post_init__(self) -> None:
        require_positive(dim=self.dim, last=self.last, init_std=self.init_std)


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
class ReluPower:
    """max(0, x) to a power."""

    kind: Literal["relu_power"] = "relu_power"
    power: float = 3.0

    def __post_init__(self) -> None:
        require(self.power >= 1, f"power={self.power} is below 1")


@spec
class SwiGlu:
    """A third matrix gates the hidden units: silu(gate) times up."""

    kind: Literal["swiglu"] = "swiglu"


@spec
class Mlp:
    """Matrices without bias; the hidden width is floor(mult * dim)."""

    mult: float = 2.0
    activation: Relu2 | LeakyRelu2 | ReluPower | SwiGlu = Relu2()

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
class LnScale:
    """The normed inputs of layer l are multiplied by 1 / sqrt(l + 1), fixed or as a start."""

    learned: bool = False


@spec
class DtgGate:
    """A learned gate per token on everything that a block adds."""

    bias_init: float = 2.0


@spec
class SkipGate:
    """A learned blend of stream and skip instead of their sum."""

    init: float = 0.0


@spec
class UNetSkips:
    """The first half of the visits hands its outputs, last in first out, to the second half."""

    init: float = 1.0
    gate: SkipGate | None = None


@spec
class Recurrence:
    """Layers `first` to `last` are run `passes` times in a row with the same weights."""

    first: int
    last: int
    passes: int = 2

    def __post_init__(self) -> None:
        require(
            0 <= self.first <= self.last, f"first={self.first} is not within 0..last={self.last}"
        )
        require(self.passes >= 2, f"passes={self.passes} must be at least 2")


@spec
class Softcap:
    """Logits are squashed to cap * tanh(logits / cap)."""

    cap: float = 30.0

    def __post_init__(self) -> None:
        require_positive(cap=self.cap)


@spec
class UntiedHead:
    """An output matrix of its own, from zero."""


@spec
class Mtp:
    """Heads that predict the tokens after the next, in training only; never exported."""

    num_heads: int = 1
    loss_weight: float = 0.2

    def __post_init__(self) -> None:
        require_positive(num_heads=self.num_heads, loss_weight=self.loss_weight)


@spec
class OrthoInit:
    """Orthogonal matrices; those that end a branch are divided by sqrt(2 * num_layers).

    The output projections of attention and MLP start at zero, unless `scaled_outputs`. Every
    other matrix is orthogonal, also one with a side below 64: the public scripts leave those as
    they construct them, and a hash table's projection is constructed as zeros, dead for ever.
    """

    scaled_outputs: bool = False


@spec
class ModelSpec:
    """A decoder-only transformer over `vocab_size` tokens."""

    vocab_size: int
    num_layers: int
    dim: int
    embedding: Embedding = Embedding()
    bigram: HashEmbedding | None = None
    trigram: HashEmbedding | None = None
    smear: SmearV1 | SmearV2 | None = None
    attention: Attention = Attention()
    value_embedding: ValueEmbedding | None = None
    mlp: Mlp = Mlp()
    residual_scale: ResidualScale | None = None
    x0_mix: X0Mix | None = None
    ln_scale: LnScale | None = None
    dtg: DtgGate | None = None
    unet: UNetSkips | None = None
    recurrence: Recurrence | None = None
    softcap: Softcap | None = None
    head: UntiedHead | None = None
    mtp: Mtp | None = None
    ortho_init: OrthoInit | None = None

    def __post_init__(self) -> None:
        require_positive(vocab_size=self.vocab_size, num_layers=self.num_layers, dim=self.dim)
        require(
            self.mlp.mult * self.dim >= 1,
            f"mlp.mult={self.mlp.mult} leaves no hidden unit at dim={self.dim}",
        )
        self._check_heads()
        self._check_layers()
        self._check_stem()

    def _check_heads(self) -> None:
        heads, rope = self.attention.num_heads, self.attention.rope
        require(
            self.dim % heads == 0,
            f"attention.num_heads={heads} does not divide dim={self.dim}",
        )
        head_dim = self.dim // heads
        require(head_dim % 2 == 0, f"the head width {head_dim} must be even")
        require(
            rope.dims is None or rope.dims <= head_dim,
            f"attention.rope.dims={rope.dims} exceeds the head width {head_dim}",
        )
        require(
            rope.ntk_reference is None or (rope.dims or head_dim) > 2,
            "attention.rope.ntk_reference needs more than 2 rotated dimensions",
        )

    def _check_layers(self) -> None:
        depth, kv = self.num_layers, self.attention.shared_kv
        for path, part in (
            ("attention.xsa", self.attention.xsa),
            ("value_embedding", self.value_embedding),
        ):
            last = None if part is None else part.last
            require(
                last is None or last <= depth,
                f"{path}.last={last} exceeds num_layers={depth}",
            )
        require(
            kv is None or 2 * (kv.last or 1) <= depth,
            f"attention.shared_kv{'' if kv is None or kv.last is None else f'.last={kv.last}'} "
            f"needs as many layers before the sharing ones; num_layers={depth}",
        )
        require(
            self.recurrence is None or self.recurrence.last < depth,
            f"recurrence.last={self.recurrence and self.recurrence.last} is not a layer "
            f"below num_layers={depth}",
        )
        require(
            self.unet is None or depth >= 2 or self.recurrence is not None,
            "unet needs two layers to hand a skip over; remove it or set num_layers=2",
        )

    def _check_stem(self) -> None:
        smear = self.smear
        if isinstance(smear, SmearV2):
            require(smear.width <= self.dim, f"smear.width={smear.width} exceeds dim={self.dim}")
            require(
                smear.bos < self.vocab_size,
                f"smear.bos={smear.bos} is no token of vocab_size={self.vocab_size}",
            )

    def exported(self) -> "ModelSpec":
        """The model that an artifact holds: without what only training uses."""
        return replace(self, mtp=None)
