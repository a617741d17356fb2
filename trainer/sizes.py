"""Parameters, forecast bytes and FLOPs of a recipe, before anything is trained. Pure.

The forecast is the entropy relation of techniques 2.27 (from the README of parameter-golf
PR #1394): a weight on a row grid of step s costs about 2.047 + log2(sigma / s) bits, and zstd
or brotli files come out 1.022 times the sum.
"""

import math
from dataclasses import dataclass

from trainer.blueprint import Blueprint, blueprint
from trainer.specs.final import FinalSpec, sd_clip
from trainer.specs.model import ModelSpec

GAUSSIAN_BITS = 2.047  # differential entropy of a unit normal, in bits
CONTAINER_FACTOR = 1.022
FLOAT_BITS = 16
SCALAR_BITS = 32
# Clipping at a searched quantile shortens the row maximum a little; measured on Gaussian rows.
SEARCHED_CLIP_FACTOR = 0.97


@dataclass(frozen=True, slots=True)
class TensorSize:
    """A parameter tensor: name as in the state dict, shape, role."""

    name: str
    shape: tuple[int, ...]
    role: str  # matrix | embed | scalar

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def tensor_sizes(plan: Blueprint) -> tuple[TensorSize, ...]:
    """List every parameter of the model that `plan` builds, in state-dict order."""
    spec, d, heads = plan.spec, plan.spec.dim, plan.spec.attention.num_heads
    sizes: list[TensorSize] = []
    if plan.num_skips:
        sizes.append(TensorSize("skip_scale", (plan.num_skips, d), "scalar"))
    sizes.append(TensorSize("embedding.weight", (spec.vocab_size, d), "embed"))
    for layer in range(spec.num_layers):
        at = f"blocks.{layer}"
        if spec.residual_scale is not None:
            sizes.append(TensorSize(f"{at}.attention_scale.scale", (d,), "scalar"))
            sizes.append(TensorSize(f"{at}.mlp_scale.scale", (d,), "scalar"))
        if spec.x0_mix is not None:
            sizes.append(TensorSize(f"{at}.x0_mix.mix", (2, d), "scalar"))
        if spec.attention.q_gain is not None:
            sizes.append(TensorSize(f"{at}.attention.q_gain.gain", (heads,), "scalar"))
        sizes += [
            TensorSize(f"{at}.attention.query.weight", (d, d), "matrix"),
            TensorSize(f"{at}.attention.key.weight", (plan.kv_dim, d), "matrix"),
            TensorSize(f"{at}.attention.value.weight", (plan.kv_dim, d), "matrix"),
            TensorSize(f"{at}.attention.out.weight", (d, d), "matrix"),
            TensorSize(f"{at}.mlp.up.weight", (plan.mlp_dim, d), "matrix"),
            TensorSize(f"{at}.mlp.down.weight", (d, plan.mlp_dim), "matrix"),
        ]
    return tuple(sizes)


def num_params(spec: ModelSpec) -> int:
    """Count the parameters of the model."""
    return sum(tensor.numel for tensor in tensor_sizes(blueprint(spec)))


def bits_per_weight(bits: int, clip: str, row: int) -> float:
    """Forecast the coded bits of a Gaussian weight in a row of `row` weights."""
    levels = 2 ** (bits - 1) - 1
    k = sd_clip(clip)
    if k is None:
        k = _expected_max(row) * (1.0 if clip == "none" else SEARCHED_CLIP_FACTOR)
    return max(GAUSSIAN_BITS + math.log2(levels / k), 0.0)


def _expected_max(row: int) -> float:
    """Expected largest |z| of `row` standard normals: about 3.2 at 512 and 3.6 at 2,048."""
    if row < 2:
        return 0.8
    spread = math.sqrt(2.0 * math.log(2.0 * row))
    return spread - (math.log(math.log(2.0 * row)) + math.log(4.0 * math.pi) - 1.1544) / (
        2.0 * spread
    )


def forecast_weights_bytes(model: ModelSpec, final: FinalSpec) -> int:
    """Forecast the bytes of the weights file, code not included."""
    total_bits = 0.0
    for tensor in tensor_sizes(blueprint(model)):
        if tensor.role == "scalar" or tensor.numel <= final.quantize.float_numel:
            total_bits += tensor.numel * (SCALAR_BITS if tensor.role == "scalar" else FLOAT_BITS)
            continue
        bits = final.quantize.embed_bits if tensor.role == "embed" else final.quantize.matrix_bits
        coded = bits_per_weight(bits, final.quantize.clip, tensor.shape[-1])
        if final.prune is not None and tensor.role == "matrix":
            coded = _pruned_bits(coded, final.prune.ratio)
        total_bits += tensor.numel * coded + tensor.shape[0] * FLOAT_BITS
    return round(CONTAINER_FACTOR * total_bits / 8)


def _pruned_bits(coded: float, ratio: float) -> float:
    """A pruned weight costs only the news that it is zero; the others lose nothing."""
    if ratio <= 0.0:
        return coded
    news = -(ratio * math.log2(ratio) + (1 - ratio) * math.log2(1 - ratio))
    # Zeros were the grid's mode already, so the news is partly known: never dearer than before.
    return min(coded, (1 - ratio) * coded + news)


def flops_per_token(model: ModelSpec, context: int) -> float:
    """Multiply-adds of one forward at the given context, times two, per token."""
    plan = blueprint(model)
    matrices = sum(t.numel for t in tensor_sizes(plan) if t.role != "scalar")
    attention = 2 * model.num_layers * model.dim * context / 2  # causal: half the square
    return 2.0 * (matrices + attention)
