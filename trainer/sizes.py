"""Parameters, forecast bytes and FLOPs of a recipe, before anything is trained. Pure.

The forecast is the entropy relation of techniques 2.27 (from the README of parameter-golf
PR #1394): a weight on a row grid of step s costs what a normal draw rounded to it costs, about
2.047 + log2(sigma / s) bits, and files come out a little larger than the sum.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from trainer.blueprint import Blueprint, LayerPlan, blueprint
from trainer.specs.final import FinalSpec, Prune, Quantize, sd_clip
from trainer.specs.model import ModelSpec, SmearV1, SmearV2, SwiGlu

# What a file comes out at, over the sum of its tensors' entropies: zstd's of techniques 2.27, the
# others as they stood to it on a trained pr414.
CONTAINER_FACTORS = {"zstd": 1.022, "brotli": 1.009, "lzma": 1.035, "zlib": 1.024, "range": 0.98}
SCALE_BITS = 16
UNCLIPPED = 10**6  # levels of a grid that reaches as far as its row
# Clipping at a searched quantile shortens the row maximum a little; measured on Gaussian rows.
SEARCHED_CLIP_FACTOR = 0.97
# The deviation of a trained row: an assumption, which matters where the scale floor rules. It is
# what brings the forecast of PR #414 (weight decay 0.04) to the 15,487,414 bytes that were
# measured; techniques 2.22 reads 0.18 off the same file, without the container's share. Rows
# trained without weight decay are wider, so that their files come out larger than forecast.
TYPICAL_ROW_STD = 0.16
ROW_STDS = (0.10, 0.22)  # and how far off it may be, before anything is trained
# Files over their forecasts: those of techniques 2.27 lie within 2 % of them, those of a trained
# pr414, whose columns differ and whose tails are heavy, up to 4 % below.
CONTAINER_SPREAD = (0.95, 1.02)


@dataclass(frozen=True, slots=True)
class TensorSize:
    """A parameter tensor: name as in the state dict, shape, role, and class of its bits."""

    name: str
    shape: tuple[int, ...]
    role: str  # matrix | embed | scalar | head: which optimizer moves it
    part: str  # mlp | attention | hash | embed | other | scalar: how many bits it is stored in

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def tensor_sizes(plan: Blueprint) -> tuple[TensorSize, ...]:
    """List every parameter of the model that `plan` builds, in state-dict order."""
    spec, d = plan.spec, plan.spec.dim
    sizes: list[TensorSize] = []
    sizes.append(TensorSize("embedding.weight", (spec.vocab_size, d), "embed", "embed"))
    if spec.unet is not None:
        sizes.append(_scalar("skips.scale", plan.num_skips, d))
        if spec.unet.gate is not None:
            sizes.append(_scalar("skips.gate", plan.num_skips, d))
    for layer in plan.layers:
        sizes += _block_sizes(plan, layer)
    if spec.smear is not None:
        sizes += _smear_sizes(spec.smear, d)
    for name, table in (("bigram", spec.bigram), ("trigram", spec.trigram)):
        if table is not None:
            sizes += [
                _scalar(f"{name}.scale"),
                TensorSize(f"{name}.table.weight", (table.num_buckets, table.dim), "embed", "hash"),
                TensorSize(f"{name}.projection.weight", (d, table.dim), "matrix", "hash"),
            ]
    values = spec.value_embedding
    if values is not None:
        table, projection = (spec.vocab_size, values.dim), (plan.kv_dim, values.dim)
        sizes += [
            _scalar("value_embedding.scale"),
            TensorSize("value_embedding.table.weight", table, "embed", "other"),
            TensorSize("value_embedding.projection.weight", projection, "matrix", "other"),
        ]
    if spec.head is not None:
        sizes.append(TensorSize("head.output.weight", (spec.vocab_size, d), "head", "embed"))
    if spec.mtp is not None:
        sizes += [
            TensorSize(f"mtp.heads.{k}.weight", (spec.vocab_size, d), "matrix", "embed")
            for k in range(spec.mtp.num_heads)
        ]
    return tuple(sizes)


def _scalar(name: str, *shape: int) -> TensorSize:
    return TensorSize(name, shape, "scalar", "scalar")


def _smear_sizes(smear: SmearV1 | SmearV2, dim: int) -> list[TensorSize]:
    if isinstance(smear, SmearV1):
        return [_scalar("smear.gate", dim)]
    return [_scalar("smear.strength"), _scalar("smear.weight", smear.width)]


def _block_sizes(plan: Blueprint, layer: LayerPlan) -> list[TensorSize]:
    spec, d, at = plan.spec, plan.spec.dim, f"blocks.{layer.index}"
    sizes: list[TensorSize] = []
    if spec.residual_scale is not None:
        sizes += [_scalar(f"{at}.attention_scale.scale", d), _scalar(f"{at}.mlp_scale.scale", d)]
    if spec.x0_mix is not None:
        sizes.append(_scalar(f"{at}.x0_mix.mix", 2, d))
    if spec.ln_scale is not None and spec.ln_scale.learned:
        sizes.append(_scalar(f"{at}.norm_scale.scale"))
    if spec.dtg is not None:
        sizes += [_scalar(f"{at}.dtg.weight", d), _scalar(f"{at}.dtg.bias")]
    if spec.attention.q_gain is not None:
        sizes.append(_scalar(f"{at}.attention.q_gain.gain", spec.attention.num_heads))
    if layer.uses_value_embedding:
        sizes.append(_scalar(f"{at}.attention.value_mix.scale", 1))
    kv = (plan.kv_dim, d)
    owned = {"key": kv, "value": kv} if layer.kv_owner == layer.index else {}
    attention = {"query": (d, d), **owned, "out": (d, d)}
    gate = {"gate": (plan.mlp_dim, d)} if isinstance(spec.mlp.activation, SwiGlu) else {}
    mlp = {"up": (plan.mlp_dim, d), **gate, "down": (d, plan.mlp_dim)}
    for part, matrices in (("attention", attention), ("mlp", mlp)):
        sizes += [
            TensorSize(f"{at}.{part}.{name}.weight", shape, "matrix", part)
            for name, shape in matrices.items()
        ]
    return sizes


def num_params(spec: ModelSpec) -> int:
    """Count the parameters of the model."""
    return sum(tensor.numel for tensor in tensor_sizes(blueprint(spec)))


def stored_bits(tensor: TensorSize, spec: Quantize) -> int:
    """Return the bits per entry that a tensor is stored in: 2..8 integers, 16 and 32 floats."""
    if tensor.role == "scalar":
        return spec.bits.scalar
    if tensor.numel <= spec.float_numel or tensor.name in float16_key_names(spec):
        return 16
    return getattr(spec.bits, tensor.part)


def float16_key_names(spec: Quantize) -> set[str]:
    """Name the key projections that the spec keeps in float16."""
    return {f"blocks.{layer}.attention.key.weight" for layer in spec.float16_keys}


def is_pruned(tensor: TensorSize, spec: Prune) -> bool:
    """Whether pruning touches a tensor; an untied head goes with the tables."""
    roles = ("matrix", "embed", "head") if spec.tables else ("matrix",)
    return tensor.role in roles and tensor.numel > spec.larger_than


@dataclass(frozen=True, slots=True)
class Forecast:
    """Bytes of a weights file: the likely figure, and what it should lie between."""

    low: int
    point: int
    high: int


def forecast_interval(
    model: ModelSpec, final: FinalSpec, row_stds: Mapping[str, float] | None = None
) -> Forecast:
    """Forecast the bytes of the weights file; code and what only training uses are not included.

    `row_stds`: the typical deviation of each tensor's rows, where the weights are there to be
    measured. Before that it lies in ROW_STDS, which matters only where a scale floor rules: any
    other step is a share of its row's own deviation. The container adds CONTAINER_SPREAD.
    """
    stds: Mapping[str, float] = {} if row_stds is None else row_stds
    low, high = (
        factor * _file_bytes(model, final, stds, std)
        for factor, std in zip(CONTAINER_SPREAD, ROW_STDS, strict=True)
    )
    point = _file_bytes(model, final, stds, TYPICAL_ROW_STD)
    most = math.inf if final.trim_ones is None else final.trim_ones.weights_bytes
    return Forecast(*(round(min(size, most)) for size in (low, point, high)))


def forecast_weights_bytes(model: ModelSpec, final: FinalSpec) -> int:
    """The likely figure of `forecast_interval`, before anything is trained."""
    return forecast_interval(model, final).point


def _file_bytes(
    model: ModelSpec, final: FinalSpec, row_stds: Mapping[str, float], otherwise: float
) -> float:
    total_bits = 0.0
    for tensor in tensor_sizes(blueprint(model.exported())):
        bits = stored_bits(tensor, final.quantize)
        if bits in (16, 32):
            total_bits += tensor.numel * bits
            continue
        row_std = row_stds.get(tensor.name, otherwise)
        coded = bits_per_weight(tensor, final.quantize, row_std)
        if final.prune is not None and is_pruned(tensor, final.prune):
            coded = _pruned_bits(coded, final.prune.ratio)
        total_bits += tensor.numel * coded + tensor.shape[0] * SCALE_BITS
    return CONTAINER_FACTORS[final.compress.kind] * total_bits / 8


def bits_per_weight(tensor: TensorSize, spec: Quantize, row_std: float = TYPICAL_ROW_STD) -> float:
    """Forecast the coded bits of a weight of an integer tensor, its rows Gaussian.

    A row's step is a share of its deviation, whatever that is, unless the scale floor is larger.
    """
    bits, clip = stored_bits(tensor, spec), spec.clip_of(tensor.part)
    levels, floor = 2 ** (bits - 1) - 1, spec.scale_floor
    most, k = levels, sd_clip(clip)
    if k is None or (bits == 8 and spec.int8 is not None):
        most = UNCLIPPED
        k = _expected_max(tensor.shape[-1])
        if spec.int8 is not None and bits == 8:
            floor = spec.int8.scale_floor
        elif clip != "none":
            k *= SEARCHED_CLIP_FACTOR
    if row_std <= 0.0:
        return 0.0
    return gaussian_code(max(k / levels, floor / row_std), most)[0]


@lru_cache(maxsize=4096)
def gaussian_code(step: float, levels: int, zero: float | None = None) -> tuple[float, float]:
    """Entropy in bits and mean squared error of a standard normal on the grid of `step`.

    Rounded to nearest and clamped to -levels..levels; magnitudes below `zero` become 0.
    """
    edge = max(step / 2, zero or 0.0)
    inside = 1.0 - 2 * _above(edge)
    bits, error = -_xlog2(inside), 1.0
    for j in range(1, levels + 1):
        low = max((j - 0.5) * step, edge)
        high = math.inf if j == levels else max((j + 0.5) * step, edge)
        share = _above(low) - _above(high)
        bits -= 2 * _xlog2(share)
        error += 2 * (j * step) * (j * step * share - 2 * (_density(low) - _density(high)))
        if high > 9.0:  # a normal draw is not seen out there
            break
    return bits, error


def _above(x: float) -> float:
    return 0.5 * math.erfc(x / math.sqrt(2))


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _xlog2(share: float) -> float:
    return share * math.log2(share) if share > 0.0 else 0.0


def _expected_max(row: int) -> float:
    """Expected largest |z| of `row` standard normals: about 3.2 at 512 and 3.6 at 2,048."""
    if row < 2:
        return 0.8
    spread = math.sqrt(2.0 * math.log(2.0 * row))
    return spread - (math.log(math.log(2.0 * row)) + math.log(4.0 * math.pi) - 1.1544) / (
        2.0 * spread
    )


def _pruned_bits(coded: float, ratio: float) -> float:
    """A pruned weight costs only the news that it is zero; the others lose nothing."""
    if ratio <= 0.0:
        return coded
    news = -(ratio * math.log2(ratio) + (1 - ratio) * math.log2(1 - ratio))
    # Zeros were the grid's mode already, so the news is partly known: never dearer than before.
    return min(coded, (1 - ratio) * coded + news)


def flops_per_token(model: ModelSpec, context: int) -> float:
    """Multiply-adds of one forward at the given context, times two, per token.

    A matrix counts as often as it is multiplied: in every visit of its layer, in every layer that
    shares it. Tables are looked up, except the token table, which is the tied output matrix.
    """
    plan = blueprint(model)
    # As if each layer owned its keys and values: borrowed ones are multiplied like one's own.
    visited = [replace(plan.layers[step.layer], kv_owner=step.layer) for step in plan.steps]
    blocks = sum(_multiplied(_block_sizes(plan, layer)) for layer in visited)
    around = _multiplied(
        size for size in tensor_sizes(plan) if size.part not in ("attention", "mlp")
    )
    tied = model.vocab_size * model.dim if model.head is None else 0
    attention = 2 * len(plan.steps) * model.dim * context / 2  # causal: half the square
    return 2.0 * (blocks + around + tied + attention)


def _multiplied(sizes: Iterable[TensorSize]) -> int:
    return sum(size.numel for size in sizes if size.role in ("matrix", "head"))
