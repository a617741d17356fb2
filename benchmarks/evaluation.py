"""What evaluation leaves out or compiles, timed against the same work in full, in one run.

    python benchmarks/evaluation.py [--recipe pr414] [--dtype bfloat16] [--window 2048] \
        [--stride 64] [--documents 40] [--batch-windows 16 66] [--tokens val.bin] \
        [--attention cudnn] [--predictions 1048576] [--modes default] \
        [--parts reachable documents compiled]

1. A batch of windows that score their last `stride`: the whole forward, then only what reaches the
   scored positions. The two take turns, and their losses are compared.
2. Documents on their own, stride 64: a filled window for each chunk; the windows that start alike
   joined, still filled; and joined in batches by length. Documents are those of --tokens, or of
   random tokens with lengths like FineWeb's. Seconds are of the device, or of one CPU thread.
3. A flat text of --predictions, eager and compiled, in batches of each of --batch-windows (1 and 2
   take the first), all by the wall: seconds without and with compilation, tokens a second, and the
   share of the measured rate of a large product that they come to, as if every position were
   computed. Then a forward of the commonest batch alone, compiled in each of torch's --modes.

Weights are random: they change no time. On a CPU, something small walks through it:
`--recipe tiny --dtype float32 --window 64 --stride 16 --documents 4 --predictions 4096`.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from gpu_parts import limits, milliseconds
from gpu_parts import seconds as wall_seconds
from torch import Tensor

from trainer.codec import parse
from trainer.data.shards import open_shard
from trainer.evaluate.sliding import plan_of, slide
from trainer.evaluate.tape import Tape
from trainer.evaluate.windows import Windows, batches, shape_of
from trainer.kernels.chosen import kernels_of
from trainer.model.build import build
from trainer.model.gpt import GPT
from trainer.model.loss import token_loss
from trainer.runtime.distributed import Ranks, best_device
from trainer.sizes import flops_per_token
from trainer.specs.documents import Documents
from trainer.specs.evaluate import EvaluateSpec
from trainer.specs.kernels import AttentionKernel, Backend
from trainer.specs.recipe import Recipe
from tune_spaces.catalogue import load_recipe

BOS = 1
LOG_MEAN, LOG_DEVIATION = 6.55, 1.05  # of FineWeb's tokens a document in sp1024: mean 1,240
TURNS = 5
PARTS = ["reachable", "documents", "compiled"]


def main() -> None:
    """Time both and print their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="pr414")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--stride", type=int, default=64)
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--batch-windows", type=int, nargs="+", default=[16, 66])
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--attention", choices=get_args(Backend), default="torch")
    parser.add_argument("--predictions", type=int, default=1 << 20)
    parser.add_argument("--modes", nargs="+", default=["default"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    told = parser.parse_args()
    device = best_device(0)
    if device.type == "cpu":
        torch.set_num_threads(1)
    recipe = parse(Recipe, load_recipe(told.recipe, "benchmark"), told.recipe)
    kernels = kernels_of(AttentionKernel(name=told.attention), device, told.dtype, "--attention")
    model = build(recipe.model.exported(), seed=0, dtype=told.dtype, kernels=kernels)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # what starts at zero would hide every difference
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    model.to(device).eval()
    flat = EvaluateSpec(window=told.window, stride=told.stride, batch_windows=told.batch_windows[0])
    apart = replace(flat, documents=Documents(bos=BOS))
    with torch.no_grad():
        if "reachable" in told.parts:
            reachable(model, apart, device)
        if "documents" in told.parts:
            by_length(model, apart, documents(told.tokens, told.documents), device)
    if "compiled" in told.parts:
        text = flat_text(told.tokens, told.predictions + 1)
        rate = limits(device)["flop_per_s"]
        print(
            f"{len(text) - 1:,} predictions in one text; a large product: {rate / 1e12:.4g} TFLOP/s"
        )
        for size in told.batch_windows:
            compiled(model, replace(flat, batch_windows=size), text, device, rate)
            modes(model, replace(flat, batch_windows=size), told.modes, device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the device's seconds, or those of this CPU thread."""
    if device.type == "cpu":
        started = time.process_time()
        work()
        return time.process_time() - started
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - started


def reachable(model: GPT, spec: EvaluateSpec, device: torch.device) -> None:
    """Time whole forwards against those of what reaches the scored positions."""
    generator = torch.Generator().manual_seed(0)
    shape = (1 if device.type == "cpu" else spec.batch_windows, spec.window + 1)
    tokens = torch.randint(2, 1024, shape, generator=generator).to(device)
    inputs, targets = tokens[:, :-1], tokens[:, -spec.stride :]

    def whole() -> Tensor:
        return token_loss(model.logits(model.hidden(inputs)[:, -spec.stride :]), targets)

    def end() -> Tensor:
        return model(inputs, targets)

    gap = float((whole() - end()).abs().max())
    taken = [(seconds(whole, device), seconds(end, device)) for _ in range(TURNS)]
    full, less = (float(np.median(column)) / len(tokens) for column in zip(*taken, strict=True))
    print(
        f"{spec.stride} of {spec.window} positions scored: whole {1e3 * full:.2f} ms a window, "
        f"reachable {1e3 * less:.2f} ms, ratio {less / full:.3f}; losses differ by {gap:.1e} nats"
    )


def documents(path: Path | None, num_documents: int) -> np.ndarray:
    """Return the first documents of a shard, or random ones of lengths like FineWeb's."""
    if path is not None:
        tokens = np.array(open_shard(path))
        starts = np.flatnonzero(tokens == BOS)
        return tokens[: starts[num_documents]] if num_documents < len(starts) else tokens
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(LOG_MEAN, LOG_DEVIATION, num_documents).astype(int) + 1
    texts = [np.append(BOS, generator.integers(2, 1024, length)) for length in lengths]
    return np.concatenate(texts).astype(np.uint16)


def by_length(model: GPT, spec: EvaluateSpec, tokens: np.ndarray, device: torch.device) -> None:
    """Time the chunks of documents, filled up to the window and in batches by length."""
    chunks = plan_of(Tape(tokens), spec)
    joined = chunks.joined()
    size = 1 if device.type == "cpu" else spec.batch_windows
    # Batches by length change nothing where all are filled up to the window.
    ways: dict[str, tuple[Iterable[Windows], bool]] = {
        "a filled window a chunk": (in_turn(chunks, size), True),
        "joined, filled": (in_turn(joined, size), True),
        "joined, by length": (batches(joined, size), False),
    }
    print(f"{len(tokens) - 1:,} predictions, chunks of {spec.stride}, windows of {spec.window}")
    first: tuple[float, float] | None = None
    for name, (parts, is_filled) in ways.items():
        tape, read = Tape(tokens), 0
        taken = 0.0
        for batch in parts:
            width = spec.window if is_filled else int(batch.length.max())
            read += width * len(batch)
            taken += seconds(lambda b=batch, w=width, t=tape: score(model, t, b, spec, w), device)
        nats = float(tape.losses.sum(dtype=np.float64))
        first = first or (taken, nats)
        print(
            f"{name:24} {read:>12,} tokens read {taken:>9.2f} s, ratio {taken / first[0]:.3f}; "
            f"total off by {abs(nats / first[1] - 1):.1e}"
        )


def in_turn(windows: Windows, size: int) -> list[Windows]:
    """Cut windows into batches in the order of the text."""
    return [windows.take(slice(i, i + size)) for i in range(0, len(windows), size)]


def score(model: GPT, tape: Tape, batch: Windows, spec: EvaluateSpec, width: int) -> None:
    """Score a batch that is `width` wide, its rows turning as in whole windows."""

    def forward(rows: Tensor, targets: Tensor, whole: int) -> Tensor:
        missing = width - rows.shape[1]
        filled = torch.nn.functional.pad(rows, (0, missing))
        wanted = torch.nn.functional.pad(targets, (0, missing))
        return model(filled, wanted, whole)[:, : targets.shape[1]]

    tape.score(forward, batch, next(model.parameters()).device, spec.window)


def flat_text(path: Path | None, num_tokens: int) -> np.ndarray:
    """Return the first tokens of a shard, or random ones."""
    if path is not None:
        return np.array(open_shard(path)[:num_tokens])
    return np.random.default_rng(0).integers(2, 1024, num_tokens).astype(np.uint16)


def compiled(
    model: GPT, spec: EvaluateSpec, tokens: np.ndarray, device: torch.device, rate: float
) -> None:
    """Time a whole evaluation eager, compiled for the first time, and compiled before."""
    torch._dynamo.reset()
    plan = plan_of(Tape(tokens), spec).joined()
    read = sum(shape_of(batch).tokens for batch in batches(plan, spec.batch_windows))
    flop = read * flops_per_token(model.plan.spec, spec.window)
    graph = replace(spec, compile=True)
    wall(model, spec, tokens[: len(tokens) // 16], device)  # kernels are loaded, clocks are up
    ways = {"eager": spec, "compiled, first": graph, "compiled": graph, "eager again": spec}
    found: dict[str, np.ndarray] = {}
    for name, way in ways.items():
        taken, found[name] = wall(model, way, tokens, device)
        gap = abs(float(np.mean(found[name] - found["eager"], dtype=np.float64)))
        print(
            f"batches of {spec.batch_windows:3}, {name:16} {taken:8.2f} s, "
            f"{read / taken:12,.0f} tokens read/s, {flop / taken / rate:6.1%} of the product's "
            f"rate; mean off by {gap:.1e} nats"
        )


def wall(
    model: GPT, spec: EvaluateSpec, tokens: np.ndarray, device: torch.device
) -> tuple[float, np.ndarray]:
    """Return the wall's seconds of an evaluation, and its losses."""
    tape, ranks = Tape(tokens), Ranks(device=device)
    return wall_seconds(lambda: slide(model, tape, spec, ranks), device), tape.losses


def modes(model: GPT, spec: EvaluateSpec, names: list[str], device: torch.device) -> None:
    """Time one forward of a full batch, compiled in some of torch's modes."""
    generator = torch.Generator().manual_seed(0)
    shape = (spec.batch_windows, spec.window + 1)
    tokens = torch.randint(2, 1024, shape, generator=generator).to(device)
    for name in names:
        torch._dynamo.reset()
        graph = torch.compile(model, fullgraph=True, dynamic=False, mode=name)
        with torch.no_grad():
            first_s = wall_seconds(
                lambda g=graph: g(tokens[:, :-1], tokens[:, -spec.stride :]), device
            )
            taken = milliseconds(
                lambda g=graph: g(tokens[:, :-1], tokens[:, -spec.stride :]), device
            )
        print(
            f"batches of {spec.batch_windows:3}, a forward, mode {name}: {taken:.2f} ms, "
            f"{first_s:.1f} s for the first"
        )


if __name__ == "__main__":
    main()
