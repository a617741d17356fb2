"""Which tensor takes how many of a weights file's bytes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from trainer.finalize.stored import Quantized, Stored


@dataclass(frozen=True, slots=True)
class Written:
    """A weights file's size, and the part of each tensor in it; "" is the header and what belongs
    to no tensor. The parts sum to num_bytes."""

    num_bytes: int
    by_tensor: dict[str, int]


def share(num_bytes: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Split a frame's bytes in proportion to what each part would take alone; exact in the sum."""
    total = math.fsum(weights.values())
    edges = np.rint(np.cumsum(list(weights.values())) * (num_bytes / total)).astype(int)
    return dict(zip(weights, np.diff(edges, prepend=0).tolist(), strict=True))


def order0_bytes(stored: Stored, *, integers: bool) -> float:
    """What a tensor takes by how often its bytes occur, each byte of a float by itself; with or
    without its integers."""
    if not isinstance(stored, Quantized):
        return _coded_bytes(stored.tensor)
    total = _coded_bytes(stored.scale)
    if integers:
        total += _coded_bytes(stored.q)
    if (part := stored.low_rank) is not None:
        tensors = (part.a, part.a_scale, part.b, part.b_scale)
        total += math.fsum(_coded_bytes(tensor) for tensor in tensors)
    return total


def _coded_bytes(tensor: Tensor) -> float:
    """The adaptive code length of Krichevsky and Trofimov (1981): what learning the frequencies
    takes is in it, so that few bytes are not free."""
    planes = tensor.contiguous().view(-1).numpy().view(np.uint8).reshape(-1, tensor.element_size())
    nats = 0.0
    for plane in planes.T:
        counts = np.bincount(plane, minlength=256).tolist()
        nats += math.lgamma(plane.size + 128.0) - math.lgamma(128.0)
        nats -= math.fsum(math.lgamma(count + 0.5) - math.lgamma(0.5) for count in counts)
    return nats / math.log(2) / 8
