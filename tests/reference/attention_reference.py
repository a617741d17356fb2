"""Slow plain twin of the model: one token, head and layer at a time, written from the formulas."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trainer.specs.model import LeakyRelu2, ModelSpec, ReluPower, SmearV1, SwiGlu


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


def visits(spec: ModelSpec) -> list[int]:
    """List the layers in the order they are run."""
    order: list[int] = []
    for layer in range(spec.num_layers):
        order.append(layer)
        again = spec.recurrence
        if again is not None and layer == again.last:
            order += list(range(again.first, again.last + 1)) * (again.passes - 1)
    return order


def gpt_logits(state: dict[str, Tensor], spec: ModelSpec, tokens: list[int], eps: float) -> Tensor:
    """Compute the logits [T, V] of one row of tokens in the state's dtype."""
    x = x0 = _stem(state, spec, tokens, eps)
    order = visits(spec)
    half = len(order) // 2 if spec.unet is not None else 0
    stack: list[Tensor] = []
    for place, layer in enumerate(order):
        if place >= half and stack:
            skip = state["skips.scale"][place - half] * stack.pop()
            if spec.unet.gate is None:
                x = x + skip
            else:
                gate = torch.sigmoid(state["skips.gate"][place - half])
                x = gate * x + (1 - gate) * skip
        x = _block(state, spec, layer, x, x0, tokens, eps)
        if place < half:
            stack.append(x)
    head = "embedding.weight" if spec.head is None else "head.output.weight"
    logits = rms(x, eps) @ state[head].T
    return (
        logits if spec.softcap is None else spec.softcap.cap * torch.tanh(logits / spec.softcap.cap)
    )


def buckets(tokens: list[int], multipliers: tuple[int, ...], num_buckets: int) -> list[int]:
    """Hash each token with those before it in whole numbers; the first ones have too few."""
    found = []
    for t in range(len(tokens)):
        if t < len(multipliers) - 1:
            found.append(num_buckets - 1)
            continue
        mixed = 0
        for distance, multiplier in enumerate(multipliers):
            mixed ^= multiplier * tokens[t - distance]
        found.append(mixed % (num_buckets - 1))
    return found


def _stem(state: dict[str, Tensor], spec: ModelSpec, tokens: list[int], eps: float) -> Tensor:
    x = state["embedding.weight"][tokens]
    for name, table, multipliers in (
        ("bigram", spec.bigram, (36313, 27191)),
        ("trigram", spec.trigram, (73856, 19349, 83492)),
    ):
        if table is not None:
            rows = state[f"{name}.table.weight"][buckets(tokens, multipliers, table.num_buckets)]
            x = x + state[f"{name}.scale"] * (rows @ state[f"{name}.projection.weight"].T)
    smear = spec.smear
    if smear is None:
        return rms(x, eps)
    if isinstance(smear, SmearV1):
        x = x if smear.before_norm else rms(x, eps)
        gate = torch.sigmoid(state["smear.gate"])
        smeared = [(1 - gate) * x[t] + gate * (x[t - 1] if t else 0 * x[t]) for t in range(len(x))]
        return rms(torch.stack(smeared), eps) if smear.before_norm else torch.stack(smeared)
    rows = []
    for t, token in enumerate(tokens):
        row = x[t]
        if t and token != smear.bos:
            gate = torch.sigmoid(state["smear.weight"] @ x[t][: smear.width])
            row = row + state["smear.strength"] * gate * x[t - 1]
        rows.append(row)
    return rms(torch.stack(rows), eps)


def _block(
    state: dict[str, Tensor],
    spec: ModelSpec,
    layer: int,
    x: Tensor,
    x0: Tensor,
    tokens: list[int],
    eps: float,
) -> Tensor:
    def weight(name: str) -> Tensor:
        return state[f"blocks.{layer}.{name}"]

    if spec.x0_mix is not None:
        mix = weight("x0_mix.mix")
        x = mix[0] * x + mix[1] * x0
    entry, factor = x, 1.0
    if spec.ln_scale is not None:
        factor = weight("norm_scale.scale") if spec.ln_scale.learned else 1 / math.sqrt(layer + 1)
    added = _attend(state, spec, layer, factor * rms(x, eps), tokens, eps)
    x = x + (weight("attention_scale.scale") * added if spec.residual_scale is not None else added)
    added = _mlp(spec, weight, factor * rms(x, eps))
    x = x + (weight("mlp_scale.scale") * added if spec.residual_scale is not None else added)
    if spec.dtg is None:
        return x
    gates = [torch.sigmoid(weight("dtg.weight") @ row + weight("dtg.bias")) for row in entry]
    return torch.stack([e + g * (y - e) for e, g, y in zip(entry, gates, x, strict=True)])


def _mlp(spec: ModelSpec, weight: Callable[[str], Tensor], x: Tensor) -> Tensor:
    hidden, kind = x @ weight("mlp.up.weight").T, spec.mlp.activation
    if isinstance(kind, SwiGlu):
        gate = x @ weight("mlp.gate.weight").T
        active = gate / (1 + torch.exp(-gate)) * hidden
    elif isinstance(kind, ReluPower):
        active = torch.where(hidden > 0, hidden, 0 * hidden) ** kind.power
    else:
        slope = kind.slope if isinstance(kind, LeakyRelu2) else 0.0
        active = torch.where(hidden > 0, hidden, slope * hidden) ** 2
    return active @ weight("mlp.down.weight").T


def _kv_owner(spec: ModelSpec, layer: int) -> int:
    shared = spec.attention.shared_kv
    if shared is None:
        return layer
    if shared.last is None:
        return 0
    return layer - shared.last if layer >= spec.num_layers - shared.last else layer


def _attend(
    state: dict[str, Tensor], spec: ModelSpec, layer: int, x: Tensor, tokens: list[int], eps: float
) -> Tensor:
    at, width = f"blocks.{layer}.attention", spec.dim // spec.attention.num_heads
    rope, from_end = spec.attention.rope, spec.num_layers - layer
    kv_at = f"blocks.{_kv_owner(spec, layer)}.attention"
    q, k, v = (
        (x @ state[f"{name}.weight"].T).reshape(len(x), -1, width)
        for name in (f"{at}.query", f"{kv_at}.key", f"{kv_at}.value")
    )
    values = spec.value_embedding
    if values is not None and from_end <= values.last:
        rows = state["value_embedding.table.weight"][tokens]
        shared = rows @ state["value_embedding.projection.weight"].T
        shared = state["value_embedding.scale"] * shared * state[f"{at}.value_mix.scale"]
        v = v + shared.reshape(v.shape)
    dims, base = rope.dims or width, rope.base
    if rope.ntk_reference is not None and len(x) > rope.ntk_reference:
        base = base * (len(x) / rope.ntk_reference) ** (dims / (dims - 2))
    q, k = (_turn_heads(rms(part, eps), dims, base) for part in (q, k))
    if spec.attention.q_gain is not None:
        q = q * state[f"{at}.q_gain.gain"][:, None]
    y = attention(q, k, v)
    xsa = spec.attention.xsa
    if xsa is not None and (xsa.last is None or from_end <= xsa.last):
        y = without_own_value(y, v)
    return y.reshape(len(x), -1) @ state[f"{at}.out.weight"].T


def without_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Remove from each head's output [T, H, E] its component along its token's v [T, K, E]."""
    out = y.clone()
    group = y.shape[1] // v.shape[1]
    for t in range(len(y)):
        for head in range(y.shape[1]):
            own = v[t, head // group]
            out[t, head] = y[t, head] - (y[t, head] @ own) / (own @ own) * own
    return out


def _turn_heads(x: Tensor, dims: int, base: float) -> Tensor:
    rows = [
        torch.stack([rotate(head, t, dims, base) for head in heads]) for t, heads in enumerate(x)
    ]
    return torch.stack(rows)
