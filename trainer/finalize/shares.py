"""How a budget of bits is shared out between units of tensors so that the loss is least.

Source: reverse water-filling (Shannon 1959): bits are spent well when one more saves the same loss
wherever it goes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from trainer.finalize.rate import Curve
from trainer.quant import levels
from trainer.sizes import gaussian_code
from trainer.specs.final import Clips, Int8Rule, Quantize

FLOAT16_BITS: Final = 13.2  # of trained weights: the exponent repeats, the rest does not
LARGEST_FACTOR: Final = 2.0**12
_ZERO_EDGES: Final = (0.54, 0.58, 0.62, 0.66, 0.70)  # of a step, where plain rounding has 0.5


@dataclass(frozen=True, slots=True)
class Share:
    """What one unit gets: a relative step on its curve, or float16 without one."""

    curve: Curve
    relative: float | None

    @property
    def bits(self) -> float:
        if self.relative is None:
            return FLOAT16_BITS * self.curve.unit.numel
        return self.curve.bits_at(self.relative)

    def scaled(self, factor: float) -> "Share":
        """This share with its step times a factor, within its limits."""
        if self.relative is None:
            return self
        low, high = self.curve.limits
        return Share(self.curve, min(max(self.relative * factor, low), high))


Shares = dict[str, Share]


def total_bits(shares: Shares) -> float:
    """Bits of all units together."""
    return sum(share.bits for share in shares.values())


def scaled(shares: Shares, factor: float) -> Shares:
    """All steps times one factor, each within its limits."""
    return {name: share.scaled(factor) for name, share in shares.items()}


def allocate(curves: Mapping[str, Curve], costs: Mapping[str, float], budget: float) -> Shares:
    """Share out `budget` bits so that the sum of cost x squared error is least.

    Never over it, unless the coarsest of all is; below it only where a unit jumps to float16.
    """
    low, high = -200.0, 200.0  # log2 of the price of a bit
    for _ in range(60):
        middle = (low + high) / 2
        if total_bits(_at_price(curves, costs, 2.0**middle)) > budget:
            low = middle
        else:
            high = middle
    dear, cheap = (_at_price(curves, costs, 2.0**price) for price in (low, high))
    # At one price a unit may like two steps alike; in between lies the budget.
    least, most = 0.0, 1.0
    for _ in range(30):
        middle = (least + most) / 2
        if total_bits(_between(cheap, dear, middle)) > budget:
            most = middle
        else:
            least = middle
    shares = _between(cheap, dear, least)
    return scaled(shares, factor_for(shares, budget))


def _between(cheap: Shares, dear: Shares, place: float) -> Shares:
    """Steps between two sharings of the same units: 0 the first, 1 the second."""
    mixed = dict(cheap)
    for name, share in cheap.items():
        other = dear[name].relative
        if share.relative is not None and other is not None:
            mixed[name] = Share(share.curve, share.relative ** (1 - place) * other**place)
    return mixed


def _at_price(curves: Mapping[str, Curve], costs: Mapping[str, float], price: float) -> Shares:
    shares: Shares = {}
    for name, curve in curves.items():
        finest, coarsest = (math.log2(limit) for limit in curve.limits)
        loss = costs[name] * curve.error + price * curve.bits
        loss = np.where((curve.places < finest) | (curve.places > coarsest), np.inf, loss)
        best = int(loss.argmin())
        is_float = price * FLOAT16_BITS * curve.unit.numel < loss[best]
        shares[name] = Share(curve, None if is_float else 2.0 ** float(curve.places[best]))
    return shares


def factor_for(shares: Shares, budget: float) -> float:
    """The factor on all steps that brings them down, or up, to a budget of bits."""
    high = math.log2(LARGEST_FACTOR)
    low = -high
    for _ in range(50):
        middle = (low + high) / 2
        if total_bits(scaled(shares, 2.0**middle)) > budget:
            low = middle
        else:
            high = middle
    return 2.0**high


def settings(shares: Shares, base: Quantize) -> Quantize:
    """Say in a spec what was shared out; the fewest bits whose range holds each class."""
    bits: dict[str, int] = {}
    clips: dict[str, str] = {}
    floor, int8 = Quantize().scale_floor, None
    for share in shares.values():
        unit = share.curve.unit
        if share.relative is None:
            bits |= dict.fromkeys(unit.classes, 16)
            continue
        fewest = unit.fewest_bits(share.relative) or unit.most_bits
        bits |= dict.fromkeys(unit.classes, fewest)
        match unit.family:
            case "sd":
                clip = f"sd{share.relative * levels(fewest):.6f}"
                clips |= dict.fromkeys(unit.classes, clip)
            case "floor":
                floor = unit.step(share.relative)
            case "int8":
                int8 = Int8Rule(quantile=1.0, scale_floor=unit.step(share.relative))
    return replace(
        base,
        bits=replace(base.bits, **bits),
        clip="none",
        clips=Clips(**clips),
        clip_scope="row",
        scale_floor=floor,
        int8=int8,
    )


def dead_zone(relative: float) -> float | None:
    """The magnitude, in steps, below which normal weights are better zeroed, where that saves 1 %
    of the error at equal bits; None where rounding is as good, as it is from about 2 bits up."""

    def product(edge: float) -> float:
        bits, error = gaussian_code(relative, levels(8), edge * relative)
        return error * 4.0**bits

    best = min(_ZERO_EDGES, key=product)
    return best if product(best) < 0.99 * product(0.5) else None
