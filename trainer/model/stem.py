"""What happens to a token before the first block: tables, hashed n-grams, the smear.

Every part maps the stream x [B, T, D] and the tokens [B, T] to the stream, and looks back only.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.model.linear import Linear
from trainer.specs import model as specs


class Embedding(nn.Module):
    """A table of one row per token or bucket, normal with deviation `init_std`, zero for 0."""

    ROLES = {"weight": "embed"}

    def __init__(self, num_rows: int, dim: int, init_std: float) -> None:
        super().__init__()
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(num_rows, dim))

    def reset_parameters(self, generator: torch.Generator) -> None:
        if self.init_std:
            nn.init.normal_(self.weight, std=self.init_std, generator=generator)
        else:
            nn.init.zeros_(self.weight)

    def forward(self, rows: Tensor) -> Tensor:
        return F.embedding(rows, self.weight)


BIGRAM = (36313, 27191)
TRIGRAM = (73856, 19349, 83492)


def buckets(tokens: Tensor, multipliers: tuple[int, ...], num_buckets: int) -> Tensor:
    """Hash each token [B, T] with the ones before it: XOR of products, modulo N − 1.

    A position without enough tokens before it gets the last bucket, N − 1.
    """
    back = len(multipliers) - 1
    num_tokens = tokens.shape[1]
    mixed = multipliers[0] * tokens[:, back:]
    for distance, multiplier in enumerate(multipliers[1:], start=1):
        earlier = tokens[:, back - distance : num_tokens - distance]
        mixed = mixed ^ (multiplier * earlier)
    # F.pad would pad more than there is room for when the sequence is shorter than the n-gram.
    hashed = F.pad(mixed % (num_buckets - 1), (back, 0), value=num_buckets - 1)
    return hashed[:, :num_tokens]


class HashEmbedding(nn.Module):
    """x + scale · P E[bucket]. The table starts at zero, so it changes nothing at init.

    Source: parameter-golf PRs #162 and #414 (bigrams), #951 (trigrams, which no optimizer held
    there); techniques 2.5, 2.6. Parameters: N·e, role embed; D·e, role matrix; 1, role scalar.
    """

    ROLES = {"scale": "scalar"}

    def __init__(self, spec: specs.HashEmbedding, dim: int, multipliers: tuple[int, ...]) -> None:
        super().__init__()
        self.multipliers = multipliers
        self.num_buckets = spec.num_buckets
        self.scale_init = spec.scale_init
        self.scale = nn.Parameter(torch.empty(()))
        self.table = Embedding(spec.num_buckets, spec.dim, init_std=0.0)
        self.projection = Linear(spec.dim, dim, start="branch end")

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, self.scale_init)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        rows = buckets(tokens, self.multipliers, self.num_buckets)
        return x + self.projection(self.table(rows)) * self.scale.to(x.dtype)


class SmearV1(nn.Module):
    """(1 − σ(γ)) ⊙ x_t + σ(γ) ⊙ x_{t−1}, with nothing before the first position.

    Source: parameter-golf PR #162, techniques 2.4. Parameters: D, role scalar.
    """

    ROLES = {"gate": "scalar"}

    def __init__(self, spec: specs.SmearV1, dim: int) -> None:
        super().__init__()
        self.init = spec.init
        self.gate = nn.Parameter(torch.empty(dim))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gate, self.init)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        share = torch.sigmoid(self.gate.to(x.dtype))
        return (1 - share) * x + share * _before(x)


class SmearV2(nn.Module):
    """x_t + λ · σ(w · x_t[:width]) · x_{t−1}, but nothing across the start of a document.

    Source: parameter-golf PRs #1667 and #1851 (the mask), techniques 2.4. Identity at init.
    Parameters: width + 1, role scalar.
    """

    ROLES = {"strength": "scalar", "weight": "scalar"}

    def __init__(self, spec: specs.SmearV2, dim: int) -> None:
        super().__init__()
        self.bos = spec.bos
        self.strength = nn.Parameter(torch.empty(()))
        self.weight = nn.Parameter(torch.empty(spec.width))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.strength)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        gate = torch.sigmoid(x[..., : self.weight.shape[0]] @ self.weight.to(x.dtype))
        share = self.strength.to(x.dtype) * gate * (tokens != self.bos)
        return x + share.unsqueeze(-1) * _before(x)


def _before(x: Tensor) -> Tensor:
    """Shift x [B, T, D] by one position, zeros first."""
    return F.pad(x[:, :-1], (0, 0, 1, 0))


class ValueEmbedding(nn.Module):
    """scale · P E[token]: what every layer that uses it adds to its values, computed once.

    Source: parameter-golf PR #374, techniques 2.11. Parameters: V·e, role embed; K·E·e, role
    matrix; 1, role scalar.
    """

    ROLES = {"scale": "scalar"}

    def __init__(self, spec: specs.ValueEmbedding, vocab_size: int, kv_dim: int) -> None:
        super().__init__()
        self.scale_init = spec.scale_init
        self.scale = nn.Parameter(torch.empty(()))
        self.table = Embedding(vocab_size, spec.dim, spec.init_std)
        self.projection = Linear(spec.dim, kv_dim, start="branch end")

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, self.scale_init)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [B, T] to [B, T, K·E]."""
        shared = self.projection(self.table(tokens))
        return shared * self.scale.to(shared.dtype)
