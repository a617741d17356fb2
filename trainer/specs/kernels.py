"""Which implementation computes an attention. They differ in speed, and in results by rounding."""

from typing import Literal

from trainer.specs.base import require, spec

Backend = Literal["torch", "cudnn", "flash", "flash_attn_4", "flash_attn_3", "flash_attn_2"]
APART: tuple[Backend, ...] = ("flash_attn_4", "flash_attn_3", "flash_attn_2", "torch")
"""Those that can keep documents apart."""


@spec
class AttentionKernel:
    """The attention of a model's layers, by name.

    `torch` takes what torch prefers on the device, `cudnn` and `flash` name one of torch's own,
    `flash_attn_N` a package of that name. Where `name` cannot run, `substitute` is taken, and
    without one that is an error.
    """

    name: Backend = "torch"
    substitute: Backend | None = None

    def __post_init__(self) -> None:
        require(
            self.substitute != self.name,
            f"substitute={self.substitute} is what it would stand for; leave it out",
        )
        require(
            self.name != "torch" or self.substitute is None,
            f"name=torch runs everywhere; leave out substitute={self.substitute}",
        )
