"""The packages that a single file needs beside the standard library."""

from typing import Final

from trainer.specs.final import FinalSpec

_ALWAYS: Final = ("torch", "numpy", "sentencepiece")
# The range coder's integers lie behind a frame of brotli's.
_BY_COMPRESSOR: Final = {
    "zstd": ("zstandard",),
    "brotli": ("brotli",),
    "range": ("brotli", "constriction"),
}
# The distribution that each attention of a recipe's comes from, where that is not torch.
ATTENTION: Final = {
    "flash_attn_4": "flash-attn-4",
    "flash_attn_3": "flash-attn-3",
    "flash_attn_2": "flash-attn",
}


def packages_of(final: FinalSpec) -> tuple[str, ...]:
    """Return the distributions, named as they are imported; `cut` allows no other."""
    return (*_ALWAYS, *_BY_COMPRESSOR.get(final.compress.kind, ()))
