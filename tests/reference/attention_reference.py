"""Slow plain twin of the model: one token, head and layer at a time, written from the formulas."""

import math

import torch
from torch import Tensor

from trainer.specs.model import LeakyRelu2, ModelSpec


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend causally from q [T, H, E] to k, v [T, K, E]; query head h reads kv head h // (H/K)."""
    num_tokens, num_heads, width = q.shape
    out = torch.zeros_like(q)
    for head in range(num_heads):
        kv_head = head // (num_heads // k.shape[1])
        for t in range(num_tokens):
            scores = [float(q[t, head] @ k[s, kv_head]) / math.sqrt(width) for s in range(t + 1)]
            weights = torch.softmax(torch.tensor(scores, dtype=q.dtype), dim=0)
            for s in range(t + 1):
                out[t, head] += weights[s] * v[s, kv_head]
    return out


def rotate(x: Tensor, t: int, dims: int, base: float) -> Tensor:
    """Turn the pairs (i, i + dims/2) of one head's vector by t * base^(-2i/dims)."""
    turned = x.clone()
    for i in range(dims // 2):
        angle = t * base ** (-2 * i / dims)
        a, b = x[i], x[i + dims // 2]
        turned[i] = a * math.cos(angle) + b * math.sin(angle)
        turned[i + dims // 2] = b * math.cos(angle) - a * math.sin(angle)
    return turned


def rms(x: Tensor, eps: float) -> Tensor:
    """Divide the last axis by its root mean square."""
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps)


def gpt_logits(state: dict[str, Tensor], spec: ModelSpec, tokens: list[int], eps: float) -> Tensor:
    """Compute the logits [T, V] of one row of tokens in the state's dtype."""
    x = x0 = rms(state["embedding.weight"][tokens], eps)
    stack: list[Tensor] = []
    num_encoder = spec.num_layers // 2 if spec.unet is not None else 0
    for layer in range(spec.num_layers):
        is_decoder = spec.unet is not None and layer >= num_encoder
        if is_decoder and stack:
            x = x + state["skip_scale"][layer - num_encoder] * stack.pop()
        x = _block(state, spec, layer, x, x0, eps)
        if layer < num_encoder:
            stack.append(x)
    logits = rms(x, eps) @ state["embedding.weight"].T
    return (
        logits if spec.softcap is None else spec.softcap.cap * torch.tanh(logits / spec.softcap.cap)
    )


def _block(
    state: dict[str, Tensor], spec: ModelSpec, layer: int, x: Tensor, x0: Tensor, eps: float
) -> Tensor:
    def weight(name: str) -> Tensor:
        return state[f"blocks.{layer}.{name}"]

    if spec.x0_mix is not None:
        mix = weight("x0_mix.mix")
        x = mix[0] * x + mix[1] * x0
    added = _attend(state, spec, layer, rms(x, eps), eps)
    x = x + (weight("attention_scale.scale") * added if spec.residual_scale is not None else added)
    hidden = rms(x, eps) @ weight("mlp.up.weight").T
    slope = spec.mlp.activation.slope if isinstance(spec.mlp.activation, LeakyRelu2) else 0.0
    active = torch.where(hidden > 0, hidden, slope * hidden) ** 2
    added = active @ weight("mlp.down.weight").T
    return x + (weight("mlp_scale.scale") * added if spec.residual_scale is not None else added)


def _attend(state: dict[str, Tensor], spec: ModelSpec, layer: int, x: Tensor, eps: float) -> Tensor:
    at, width = f"blocks.{layer}.attention", spec.dim // spec.attention.num_heads
    rope = spec.attention.rope
    q, k, v = (
        (x @ state[f"{at}.{name}.weight"].T).reshape(len(x), -1, width)
        for name in ("query", "key", "value")
    )
    q, k = (_turn_heads(rms(part, eps), rope.dims or width, rope.base) for part in (q, k))
    if spec.attention.q_gain is not None:
        q = q * state[f"{at}.q_gain.gain"][:, None]
    return attention(q, k, v).reshape(len(x), -1) @ state[f"{at}.out.weight"].T


def _turn_heads(x: Tensor, dims: int, base: float) -> Tensor:
    rows = [
        torch.stack([rotate(head, t, dims, base) for head in heads]) for t, heads in enumerate(x)
    ]
    return torch.stack(rows)
