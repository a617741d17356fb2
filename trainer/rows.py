"""How wide the rows of a state's matrices are: what a forecast of their bytes has to know.

Shapes: weight [rows, cols].
"""

from collections.abc import Mapping

import torch
from torch import Tensor

# A dead row costs next to nothing, and its logarithm must not decide over the others.
NARROWEST = 1 / 64


@torch.no_grad()
def row_deviations(weight: Tensor) -> Tensor:
    """Return the standard deviation of each row, float32 [rows], at least NARROWEST of the widest
    one's."""
    deviations = weight.float().std(dim=1, correction=0)
    return deviations.clamp(min=float(deviations.max()) * NARROWEST)


def typical_deviations(state: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the geometric mean of the rows' deviations of every matrix of a state, 0 for zeros.

    Bits go by the logarithm of a deviation, so this one number forecasts a tensor's.
    """
    return {
        name: float(row_deviations(tensor).double().log().mean().exp())
        for name, tensor in state.items()
        if tensor.ndim == 2
    }
