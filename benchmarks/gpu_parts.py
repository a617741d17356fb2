"""What `gpu.py` measures: each function takes a recipe or a device and returns plain figures.

Seconds are of the wall with the device settled; milliseconds of kernels are the device's own. The
trainer's own code paths run: what a training, a score and a final call is called here.
"""

import gc
import importlib
import json
import pkgutil
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from trainer import kernels, optim
from trainer.data.manifest import Manifest, Split, Tokenizer, content_digest
from trainer.data.shards import Dataset, describe_shard, write_shard
from trainer.evaluate.evaluators import evaluate
from trainer.evaluate.tape import Tape
from trainer.finalize.calibration import training_batches
from trainer.finalize.hessians import collect_hessians
from trainer.finalize.pipeline import finalize
from trainer.kernels.attention import attention_of, lacking
from trainer.kernels.chosen import kernels_of_score
from trainer.model.build import build
from trainer.model.roles import roles_of
from trainer.runtime.clock import Clock
from trainer.runtime.distributed import Ranks
from trainer.specs.final import Gptq, Zstd
from trainer.specs.kernels import Backend
from trainer.specs.model import ModelSpec
from trainer.specs.recipe import Recipe
from trainer.specs.task import train_task
from trainer.train.runner import StepRunner
from trainer.train.state import TrainState

Figures = dict[str, Any]
SEED = 0
REPEATS = 25
TIMED_STEPS = 3
ATTENTION = re.compile(r"cudnn|flash|fmha", re.IGNORECASE)
MATMUL = re.compile(r"nvjet|gemm|cutlass|gemv", re.IGNORECASE)
CLASSES = ("attention", "matmul", "own", "memory", "other")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured: `FULL` on a GPU, `SMALL` where only the walk through it counts."""

    product: int
    copy_bytes: int
    attention: tuple[int, int, int, int, int]
    """B, T, H, K, E"""
    predictions: int
    calibration: Gptq


FULL = Sizes(8192, 1 << 30, (48, 2048, 8, 4, 64), 1 << 20, Gptq())
SMALL = Sizes(256, 1 << 24, (2, 64, 4, 2, 16), 2048, Gptq(sequences=4, seq_len=32))


def sizes_of(device: torch.device) -> Sizes:
    """The sizes that a device is measured at."""
    return FULL if device.type == "cuda" else SMALL


def settle(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the wall's seconds of a piece of work, the device settled before and after."""
    settle(device)
    started = time.perf_counter()
    work()
    settle(device)
    return time.perf_counter() - started


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the median of `REPEATS` runs, by CUDA events on a GPU."""
    for _ in range(3):
        work()
    if device.type != "cuda":
        return 1e3 * median(seconds(work, device) for _ in range(REPEATS))
    pairs = []
    for _ in range(REPEATS):
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        work()
        pair[1].record()
        pairs.append(pair)
    settle(device)
    return median(start.elapsed_time(stop) for start, stop in pairs)


def tidy() -> None:
    """Give back what a column held, so that the next starts as in a fresh process."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def limits(device: torch.device) -> Figures:
    """Measure what the device can do: a large product of random matrices, and a copy."""
    sizes = sizes_of(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(SEED)
    shape = (sizes.product, sizes.product)
    a, b = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
    product_ms = milliseconds(lambda: a @ b, device)
    source = torch.zeros(sizes.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_ms = milliseconds(lambda: target.copy_(source), device)
    return {
        "flop_per_s": 2e3 * sizes.product**3 / product_ms,
        "bytes_per_s": 2e3 * sizes.copy_bytes / copy_ms,
    }


def attention(device: torch.device) -> Figures:
    """Time every back end forward and backward; one that cannot run has its reason instead."""
    batch, num_tokens, heads, kv_heads, width = sizes_of(device).attention
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(SEED)

    def draw(num_heads: int) -> Tensor:
        shape = (batch, num_tokens, num_heads, width)
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    inputs = [draw(n).requires_grad_() for n in (heads, kv_heads, kv_heads)]
    grad = draw(heads)
    found: Figures = {}
    for name in get_args(Backend):
        why = lacking(name, device, "bfloat16")
        try:
            found[name] = {"missing": why} if why else _one_attention(name, inputs, grad, device)
        except Exception as error:  # the other back ends' figures are still wanted
            found[name] = {"missing": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
    found["flop_forward"] = 2.0 * batch * heads * num_tokens**2 * width
    return found


def _one_attention(
    name: Backend, inputs: list[Tensor], grad: Tensor, device: torch.device
) -> Figures:
    attend = attention_of(name)
    with torch.no_grad():
        forward = milliseconds(lambda: attend(*inputs), device)
    out = attend(*inputs)
    backward = milliseconds(
        lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True), device
    )
    return {"forward_ms": forward, "backward_ms": backward}


def random_dataset(recipe: Recipe, folder: Path, device: torch.device) -> Dataset:
    """Write shards of independent tokens whose frequencies follow Zipf's law, and no tokenizer."""
    sizes, vocab_size = sizes_of(device), recipe.model.vocab_size
    frequency = 1.0 / np.arange(1, vocab_size + 1)
    generator = np.random.default_rng(SEED)
    calibration = sizes.calibration.sequences * sizes.calibration.seq_len
    lengths = {"train": max(6 * recipe.train.batch_tokens, calibration) + 1}
    lengths["val"] = sizes.predictions + 1
    splits = {"holdout": Split(shards=(), tokens=0, documents=0, bytes=0)}
    for name, length in lengths.items():
        tokens = generator.choice(vocab_size, length, p=frequency / frequency.sum())
        path = folder / f"random_{name}_000000.bin"
        write_shard(path, tokens)
        shard = describe_shard(path)
        splits[name] = Split(shards=(shard,), tokens=length, documents=1, bytes=length)
    tokenizer = Tokenizer(sha256="0" * 64, vocab_size=vocab_size)
    digest = content_digest(tokenizer, splits)
    manifest = Manifest(
        name="random", tokenizer=tokenizer, splits=splits, settings={}, digest=digest
    )
    return Dataset(folder=folder, manifest=manifest)


class Training:
    """A training's state and its steps, without a clock to end it and without observation."""

    def __init__(self, recipe: Recipe, dataset: Dataset, ranks: Ranks) -> None:
        self.ranks, task = ranks, train_task(recipe)
        self.state = TrainState(task, ranks, Clock())
        self.runner = StepRunner(task, dataset, self.state, ranks)

    def step(self) -> None:
        """Run one whole step as the loop does."""
        state = self.state
        self.runner.step(state.step, 1.0)
        state.step += 1
        state.averages.update(state.step, 1.0, 0.0)

    def update(self) -> None:
        """Do what comes after the last backward: clip, optimizers, averages."""
        self.state.optimizers.step(self.state.step, 1.0)
        self.state.averages.update(self.state.step + 1, 1.0, 0.0)

    def give_gradients(self) -> None:
        """Put gradients where a backward would have."""
        for parameter in self.state.model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)


def training(recipe: Recipe, dataset: Dataset, ranks: Ranks, parts: set[str]) -> Figures:
    """Time steps, or only the update; split both by the kernels that they run."""
    device, work = ranks.device, Training(recipe, dataset, ranks)
    found: Figures = {}
    if "step" in parts:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        first_s = seconds(work.step, device)
        work.step()
        steps = [seconds(work.step, device) for _ in range(TIMED_STEPS)]
        step_s = sum(steps) / len(steps)
        found |= {"step_ms": 1e3 * step_s, "steps_ms": [1e3 * each for each in steps]}
        found |= {"compile_s": first_s - step_s, "kernels_ms": kernel_times(work.step, device)}
        found["tokens_per_s"] = recipe.train.batch_tokens / step_s
        if device.type == "cuda":
            found["peak_gib"] = torch.cuda.max_memory_allocated(device) / (1 << 30)
        ahead = range(work.state.step, work.state.step + TIMED_STEPS)
        found["loader_ms"] = 1e3 * median(
            seconds(lambda at=at: work.runner.loader.rows(at), device) for at in ahead
        )
    if "update" in parts:
        found |= _update(work, device)
    return found


def _update(work: Training, device: torch.device) -> Figures:
    """Time the update on the wall, and its kernels."""
    walls = []
    for _ in range(2 + TIMED_STEPS):
        work.give_gradients()
        walls.append(seconds(work.update, device))
    work.give_gradients()
    settle(device)
    return {
        "update_ms": 1e3 * median(walls[2:]),
        "update_kernels_ms": kernel_times(work.update, device),
    }


def kernel_times(work: Callable[[], object], device: torch.device) -> Figures:
    """Return the device's milliseconds by class, and the number of launches; empty on a CPU."""
    if device.type != "cuda":
        return {}
    settle(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        work()
        settle(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return by_class(events, own_kernels())


def by_class(events: list[dict[str, Any]], own: set[str]) -> Figures:
    """Sum a trace's kernels: milliseconds by class, launches, and the ten longest names.

    A compiled kernel's name may hold those of the operators around it; what a kernel is follows
    from the name only where it is not the compiler's own.
    """
    sums: dict[str, float] = dict.fromkeys(CLASSES, 0.0)
    names: dict[str, float] = {}
    launches = 0
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        launches += 1
        taken_ms, name = event["dur"] / 1e3, event["name"]
        kind = class_of(name, own) if event["cat"] == "kernel" else "memory"
        sums[kind] += taken_ms
        names[f"{kind}: {name[:90]}"] = names.get(f"{kind}: {name[:90]}", 0.0) + taken_ms
    longest = sorted(names.items(), key=lambda item: -item[1])[:10]
    return {**sums, "launches": launches, "longest": dict(longest)}


def class_of(name: str, own: set[str]) -> str:
    """Say of which class a kernel is: attention, matmul, own or other."""
    if re.sub(r"(_\d+)+$", "", name) in own or name in own:
        return "own"
    if name.startswith("triton_"):
        return "matmul" if name.startswith("triton_tem_") else "other"
    if ATTENTION.search(name):
        return "attention"
    return "matmul" if MATMUL.search(name) else "other"


def own_kernels() -> set[str]:
    """The names of the Triton kernels that the trainer itself has, where Triton is to be had."""
    return set(_kernel_names())


def _kernel_names() -> Iterator[str]:
    for package in (kernels, optim):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            try:
                loaded = importlib.import_module(module.name)
            except ImportError:  # it belongs to a package that is not here
                continue
            for value in vars(loaded).values():
                inner = getattr(value, "fn", None)  # an autotuned kernel wraps another
                if type(value).__module__.startswith("triton") and inner is not None:
                    yield getattr(inner, "__name__", None) or inner.fn.__name__


def evaluation(recipe: Recipe, dataset: Dataset, ranks: Ranks) -> Figures:
    """Time the recipe's evaluation; where it compiles, once with that and once more without."""
    device, spec = ranks.device, recipe.evaluate
    stream = dataset.stream("val")
    tokens = stream.read(0, min(len(stream), sizes_of(device).predictions + 1))
    dtype = recipe.train.dtype
    chosen = kernels_of_score(spec, device, dtype)
    model = build(recipe.model.exported(), seed=SEED, dtype=dtype, kernels=chosen).to(device)

    def score(upto: int) -> float:
        return seconds(lambda: evaluate(model, Tape(tokens[:upto]), spec, ranks), device)

    found: Figures = {"predictions": len(tokens) - 1}
    if spec.compile:
        found["evaluation_first_s"] = score(len(tokens))
    else:
        score(len(tokens) // 16 + 1)
    found["evaluation_s"] = score(len(tokens))
    return found


def final(recipe: Recipe, dataset: Dataset, ranks: Ranks) -> Figures:
    """Time a final with GPTQ by its parts, its kernels built before."""
    device = ranks.device
    model = build(recipe.model, seed=SEED, dtype=recipe.train.dtype)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():  # rows of zeros would have nothing to round
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    model.to(device).eval()
    gptq = sizes_of(device).calibration
    hessians: dict[str, Tensor] = {}

    def collect() -> None:
        batches = training_batches(dataset.stream("train"), gptq, ranks)
        hessians.update(collect_hessians(model, batches, ranks))

    found: Figures = {"hessians_first_s": seconds(collect, device)}
    found["hessians_s"] = seconds(collect, device)
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    whole = replace(recipe.final, quantize=replace(recipe.final.quantize, gptq=gptq))
    quick = replace(whole, compress=Zstd(level=1))
    with tempfile.TemporaryDirectory() as folder:
        finalize(state, recipe.model, quick, Path(folder) / "quick", "0" * 64, hessians)
        report = finalize(state, recipe.model, whole, Path(folder) / "whole", "0" * 64, hessians)
    found |= {f"final_{part}_s": taken for part, taken in report.clock_s.items()}
    for record in report.tensors:
        key = f"final_{record.method}_s"
        found[key] = found.get(key, 0.0) + record.seconds
    return found | {"artifact_bytes": report.artifact_bytes}


def work_of(recipe: Recipe) -> Figures:
    """Count what the model's products cost, by formula; every matrix is taken to be used once.

    A matrix costs 2 FLOP a weight and token forward and twice that backward; causal attention
    2·T·H·E a token and layer forward and, like the matrices here, twice that backward.
    """
    model: ModelSpec = recipe.model.exported()
    network = build(model)
    roles = roles_of(network)
    weights = sum(
        parameter.numel()
        for name, parameter in network.named_parameters()
        if roles[name] in ("matrix", "head")
    )
    if "head" not in roles.values():
        weights += model.vocab_size * model.dim
    train, spec = recipe.train, recipe.evaluate

    def forward(num_tokens: int, reach: int) -> float:
        return num_tokens * (2.0 * weights + 2.0 * reach * model.dim * model.num_layers)

    def windows(predictions: int) -> float:
        return forward(predictions * spec.window // spec.stride, spec.window)

    params = sum(parameter.numel() for parameter in network.parameters())
    shapes: Mapping[str, torch.Size] = {n: p.shape for n, p in network.named_parameters()}
    rows = [sorted(shapes[name]) for name, role in roles.items() if role == "matrix"]
    steps = train.optimizer.matrix.ns_steps
    return {
        "matrix_weights": weights,
        "step_flop": 3.0 * forward(train.batch_tokens, train.seq_len),
        "evaluation_flop_a_prediction": windows(1 << 20) / (1 << 20),
        # Gradients are read twice, momenta, weights and one shadow are read and written, float32.
        "update_bytes": 32.0 * params,
        "update_flop": steps * sum(4.0 * m * m * n + 2.0 * m**3 for m, n in rows),
    }
