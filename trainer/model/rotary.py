"""Rotary positions on the first dims of each head."""

import torch
from torch import Tensor, nn


def ntk_base(base: float, num_tokens: int, reference: int | None, dims: int) -> float:
    """Return the base for a sequence: raised by (T / reference)^(dims / (dims − 2)) beyond it.

    Source: the NTK-aware rule as in parameter-golf PR #414 (techniques 2.9).
    """
    if reference is None or num_tokens <= reference:
        return base
    return base * (num_tokens / reference) ** (dims / (dims - 2))


class Rotary(nn.Module):
    """Cosines and sines of t · base^(−2i/dims), for positions 0 … T−1, in float32.

    Source: Su et al., arXiv 2104.09864. Half-split pairing: dimension i turns with i + dims/2.
    """

    def __init__(self, dims: int, base: float, ntk_reference: int | None = None) -> None:
        super().__init__()
        self.dims = dims
        self.base = base
        self.ntk_reference = ntk_reference

    def forward(
        self, num_tokens: int, device: torch.device, width: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (cos, sin), each [1, T, 1, dims/2]. Recomputed: cheaper than a cache to keep.

        The T tokens may begin a window of `width`: the base is that of the whole window.
        """
        base = ntk_base(self.base, width or num_tokens, self.ntk_reference, self.dims)
        exponents = torch.arange(0, self.dims, 2, dtype=torch.float32, device=device) / self.dims
        times = torch.arange(num_tokens, dtype=torch.float32, device=device)
        angles = torch.outer(times, base**-exponents)
        return angles.cos()[None, :, None, :], angles.sin()[None, :, None, :]


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the first 2·half dimensions of every head of x [B, T, heads, E]; pass the rest."""
    cos, sin = (table.to(x.dtype) for table in rope)
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)
