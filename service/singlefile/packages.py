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


def packages_of(final: FinalSpec) -> tuple[str, ...]:
    """Return the distributions, named as they are imported; `cut` allows no other."""
    return (*_ALWAYS, *_BY_COMPRESSOR.get(final.compress.kind, ()))
