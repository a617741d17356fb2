"""What evaluation leaves out, timed against the same work in full, in one run.

    python benchmarks/evaluation.py [--recipe pr414] [--dtype bfloat16] [--window 2048] \
        [--stride 64] [--documents 40] [--batch-windows 32] [--tokens val.bin]

1. A batch of windows that score their last `stride`: the whole forward, then only what reaches the
   scored positions. The two take turns, and their losses are compared.
2. Documents on their own, stride 64: a filled window for each chunk; the windows that start alike
   joined, still filled; and joined in batches by length. Documents are those of --tokens, or of
   random tokens with lengths like FineWeb's. Seconds are of the device, or of one CPU thread.

Weights are random: they change no time.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.codec import parse
from trainer.data.shards import open_shard
from trainer.evaluate.sliding import plan_of
from trainer.evaluate.tape import Tape
from trainer.evaluate.windows import Windows, batches
from trainer.model.build import build
from trainer.model.gpt import GPT
from trainer.model.kernels import token_loss
from trainer.runtime.distributed import best_device
from trainer.specs.evaluate import Documents, EvaluateSpec
from trainer.specs.recipe import Recipe
from tune_spaces.catalogue import load_recipe

BOS = 1
LOG_MEAN, LOG_DEVIATION = 6.55, 1.05  # of FineWeb's tokens a document in sp1024: mean 1,240
TURNS = 5


def main() -> None:
    """Time both and print their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="pr414")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--stride", type=int, default=64)
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--batch-windows", type=int, default=32)
    parser.add_argument("--tokens", type=Path)
    told = parser.parse_args()
    device = best_device(0)
    if device.type == "cpu":
        torch.set_num_threads(1)
    recipe = parse(Recipe, load_recipe(told.recipe, "benchmark"), told.recipe)
    model = build(recipe.model, seed=0, dtype=told.dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # what starts at zero would hide every difference
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    model.to(device).eval()
    spec = EvaluateSpec(
        window=told.window,
        stride=told.stride,
        batch_windows=told.batch_windows,
        documents=Documents(bos=BOS),
    )
    with torch.no_grad():
        reachable(model, spec, device)
        by_length(model, spec, documents(told.tokens, told.documents), device)


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


if __name__ == "__main__":
    main()
