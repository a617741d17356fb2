"""Compare our coder with general compressors on the block matrices of a real checkpoint.

    python benchmarks/coders.py /tmp/imported/import/bank [--entry raw] [--recipe pr414]

The folder is the bank that a training or `fairway import` left. The matrices of its blocks, of
pr414 66 with 25,952,256 weights, are quantized as the recipe says and with clips at 12.85
deviations of the row. The general compressors get all integers at once, by columns and the same
part of every layer side by side, with the settings of `trainer.finalize.compress`; our coder gets
the matrices in the order of the model. Not counted for either: the float16 scales of the rows.
Seconds are of one CPU core: set OMP_NUM_THREADS=1.

order 0: the entropy of each matrix's integers, tables free. ideal: Gaussians with one deviation
a row times one a column, the likeliest ones, known for nothing: no file can be as small. public:
what zstd-22 and brotli-11 take as the public scripts call them.
"""

import argparse
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from trainer.codec import parse
from trainer.finalize.coder import Integers, Shape, decode, encode
from trainer.finalize.coder_fit import Likelihood, nats_of
from trainer.finalize.compress import compress, decompress
from trainer.finalize.quantize import quantize_matrix
from trainer.runtime.tensors import load_tensors
from trainer.specs.final import Brotli, Lzma, Quantize, Zlib, Zstd
from trainer.specs.recipe import Recipe
from tune_spaces.catalogue import load_recipe

T = TypeVar("T")
BLOCK_MATRIX = re.compile(r"blocks\.\d+\.(attention|mlp)\..*weight")
BITS = 6
GENERAL = {"zstd-22": Zstd(), "brotli-11": Brotli(), "xz-9": Lzma(), "zlib-9": Zlib()}
ISSUE = {"recipe": (13_624_215, 12_914_938), "sd12.85": (10_875_778, 10_844_162)}


def main() -> None:
    """Quantize twice and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bank", type=Path)
    parser.add_argument("--entry", default="raw")
    parser.add_argument("--recipe", default="pr414")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    state = load_tensors(arguments.bank, arguments.entry)
    weights = {name: w for name, w in state.items() if BLOCK_MATRIX.fullmatch(name)}
    quantize = parse(Recipe, load_recipe(arguments.recipe, "benchmark"), "recipe").final.quantize
    clipped = replace(quantize, clip="sd12.85", clip_scope="row", scale_floor=1e-12)
    for title, spec in {"recipe": quantize, "sd12.85": clipped}.items():
        matrices = [quantized(name, weight, spec) for name, weight in weights.items()]
        print(f"{title}: {sum(one.q.size for one in matrices):,} integers of {BITS} bits")
        show(compare(matrices), ISSUE[title])


def quantized(name: str, weight: torch.Tensor, spec: Quantize) -> Integers:
    """Round a matrix as the spec says."""
    stored, _ = quantize_matrix(weight, BITS, spec)
    return Integers(name, stored.q.numpy(), BITS, stored.scale.numpy())


def compare(matrices: Sequence[Integers]) -> dict[str, tuple[int, float, float]]:
    """Return bytes, seconds to write and seconds to read by coder; bounds have no seconds."""
    sides = sorted(matrices, key=lambda one: [p for p in one.name.split(".") if not p.isdigit()])
    data = b"".join(one.q.T.tobytes() for one in sides)
    rows: dict[str, tuple[int, float, float]] = {}
    for name, spec in GENERAL.items():
        frame, write_s = timed(lambda spec=spec: compress(data, spec))
        back, read_s = timed(
            lambda kind=spec.kind, frame=frame: decompress(frame, kind, len(data), kind)
        )
        check(bytes(back) == data, name)
        rows[name] = (len(frame), write_s, read_s)
    blobs, write_s = timed(lambda: encode(matrices))
    shapes = [
        Shape(one.name, one.q.shape[0], one.q.shape[1], one.bits, one.scale) for one in matrices
    ]
    backs, read_s = timed(lambda: decode(blobs, shapes, "ours"))
    check(all(np.array_equal(a.q, b) for a, b in zip(matrices, backs, strict=True)), "ours")
    rows["ours"] = (sum(map(len, blobs)), write_s, read_s)
    for name, bound in {"order 0": order_0, "ideal": ideal}.items():
        rows[name] = (round(sum(bound(one.q) for one in matrices)), 0.0, 0.0)
    return rows


def show(rows: dict[str, tuple[int, float, float]], public: tuple[int, int]) -> None:
    """Print the table."""
    zstd, brotli = rows["zstd-22"][0], rows["brotli-11"][0]
    print(
        f"{'':10}{'bytes':>12}{'under zstd':>12}{'under brotli':>14}{'public zstd':>13}"
        f"{'public brotli':>15}{'write s':>9}{'read s':>8}"
    )
    for name, (size, write_s, read_s) in rows.items():
        shares = [1 - size / other for other in (zstd, brotli, *public)]
        widths = (12, 14, 12, 14)
        under = "".join(f"{share:{w}.2%}" for share, w in zip(shares, widths, strict=True))
        seconds = f"{write_s:9.1f}{read_s:8.1f}" if write_s else ""
        print(f"{name:10}{size:12,}{under}{seconds}")


def order_0(q: np.ndarray) -> float:
    """Return the entropy of a matrix's integers in bytes."""
    counts = np.unique(q, return_counts=True)[1]
    return float(-(counts * np.log2(counts / q.size)).sum() / 8)


def ideal(q: np.ndarray) -> float:
    """Return the bytes of a matrix under the likeliest Gaussian of row times column."""
    fit = Likelihood(q)
    rows, cols = fit.start()
    for _ in range(4):
        rows += fit.step(rows, cols, 1)[0]
        cols += fit.step(rows, cols, 0)[0]
    nats = nats_of(0, fit.low, fit.high)[fit.classes(rows, cols), fit.symbols]
    return float(nats.sum() / np.log(2.0) / 8)


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Return what work returns, and its CPU seconds."""
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def check(is_same: bool, name: str) -> None:
    """Refuse to time a coder that loses something."""
    if not is_same:
        raise AssertionError(f"{name} did not give the integers back")


if __name__ == "__main__":
    main()
