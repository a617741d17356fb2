"""Slow plain twins of test-time training: one document, one parameter at a time.

They know neither the tape nor the seams for adapters: adapters act through forward hooks, and SGD
is written out.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from tests.reference import sliding_reference
from trainer.model.gpt import GPT
from trainer.specs.ttt import LoraTtt, Phases, SgdTtt

Momenta = dict[str, Tensor]


def losses_of(model: GPT, tokens: Sequence[int], width: int) -> list[Tensor]:
    """Return the loss of every prediction of some tokens, float32."""
    logits = model.logits(model.hidden(torch.tensor([tokens[:-1]]), width))[0].float()
    chances = torch.log_softmax(logits, dim=-1)
    return [-chances[i, target] for i, target in enumerate(tokens[1:])]


def sgd_step(
    model: GPT, rows: list[list[int]], momenta: Momenta, lr: float, ttt: SgdTtt | Phases, width: int
) -> None:
    """Move every parameter once down the mean loss of some sequences."""
    losses = [loss for row in rows for loss in losses_of(model, row, width)]
    named = dict(model.named_parameters())
    total = torch.stack(losses).mean()
    gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    known = {n: g for n, g in zip(named, gradients, strict=True) if g is not None}
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in known.values()))
    factor = min(1.0, ttt.clip_norm / (norm + 1e-6))
    with torch.no_grad():
        for name, gradient in known.items():
            momenta[name] = ttt.momentum * momenta.get(name, 0.0) + factor * gradient
            named[name] -= lr * momenta[name]


def sgd(model: GPT, tokens: list[int], window: int, stride: int, ttt: SgdTtt) -> list[float]:
    """Score-first SGD on chunks; returns every prediction's loss."""
    model, num, size = deepcopy(model).eval(), len(tokens) - 1, ttt.chunk_tokens
    windows: dict[int, list[int]] = defaultdict(list)
    for start, prediction in sliding_reference.plan(num, window, stride):
        windows[start].append(prediction)
    chunks: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for start, predictions in windows.items():
        chunks[predictions[0] // size] += [(start, prediction) for prediction in predictions]
    losses, momenta, last = [0.0] * num, {}, (num - 1) // size
    for chunk in range(last + 1):
        for start, prediction in chunks[chunk]:
            with torch.no_grad():
                read = tokens[start : prediction + 2]
                losses[prediction] = float(losses_of(model, read, window)[-1])
        if chunk == last:
            break
        firsts = range(chunk * size, (chunk + 1) * size - window + 1, window)
        rows = [tokens[first : first + window + 1] for first in firsts]
        lr = ttt.lr / 2 * (1 + math.cos(math.pi * chunk / last))
        for _ in range(ttt.epochs):
            for i in range(0, len(rows), ttt.batch_sequences):
                sgd_step(model, rows[i : i + ttt.batch_sequences], momenta, lr, ttt, window)
    return losses


def phase(model: GPT, documents: list[list[int]], window: int, phases: Phases) -> GPT:
    """One pass of SGD over documents, each with one token more than predictions."""
    model, momenta = deepcopy(model).eval(), {}
    chunks: list[list[list[int]]] = [[]]
    for document in documents:
        for first in range(0, len(document) - 1, window):
            row = document[first : first + window + 1]
            held = sum(len(other) - 1 for other in chunks[-1])
            if held and held + len(row) - 1 > phases.chunk_tokens:
                chunks.append([])
            chunks[-1].append(row)
    for index, rows in enumerate(chunks):
        lr = phases.lr / 2 * (1 + math.cos(math.pi * index / max(len(chunks) - 1, 1)))
        for _ in range(phases.epochs):
            sgd_step(model, rows, momenta, lr, phases, window)
    return model


def lora(model: GPT, tokens: list[int], window: int, chunk: int, ttt: LoraTtt) -> list[float]:
    """Score one document whose own fresh adapters take a step after every chunk but the last."""
    model = deepcopy(model).eval()
    visits, tensors = _hooked(model, ttt)
    optimizer = torch.optim.AdamW(
        tensors,
        lr=ttt.lr,
        betas=(ttt.beta1, ttt.beta2),
        eps=ttt.eps,
        weight_decay=ttt.weight_decay,
    )
    losses: list[float] = []
    num = len(tokens) - 1
    for first in range(0, num, chunk):
        stop = min(first + chunk, num)
        start = max(0, stop - window)
        visits.clear()
        chunk_losses = losses_of(model, tokens[start : stop + 1], window)[first - start :]
        losses += [float(loss.detach()) for loss in chunk_losses]
        if stop < num:
            optimizer.zero_grad()
            torch.stack(chunk_losses).mean().backward()
            optimizer.step()
    return losses


def _hooked(model: GPT, ttt: LoraTtt) -> tuple[dict[str, int], list[nn.Parameter]]:
    """Add s · B A x to what the adapted modules return, for each visit of a layer another pair.

    Returns how often each module was visited, to be cleared before a forward, and all A and B.
    """
    generator = torch.Generator().manual_seed(ttt.seed)
    pairs: dict[str, list[tuple[nn.Parameter, nn.Parameter]]] = defaultdict(list)
    visits: dict[str, int] = defaultdict(int)
    modules = dict(model.named_modules())
    for path in _visited(model, ttt):
        vocab_size, dim = model.embedding.weight.shape
        weight = getattr(modules[path], "weight", None)
        out = vocab_size if path == "head" else dim
        out, width = (out, dim) if weight is None else weight.shape
        a = torch.empty(ttt.rank, width)
        a.uniform_(-(width**-0.5), width**-0.5, generator=generator)
        pairs[path].append((nn.Parameter(a), nn.Parameter(torch.zeros(out, ttt.rank))))

    def hook(path: str):
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            a, b = pairs[path][visits[path]]
            visits[path] += 1
            return output + ttt.alpha / ttt.rank * torch.einsum("or,ri,...i->...o", b, a, args[0])

        return add

    for path in pairs:
        modules[path].register_forward_hook(hook(path))
    return visits, [tensor for held in pairs.values() for pair in held for tensor in pair]


def _visited(model: GPT, ttt: LoraTtt) -> list[str]:
    """Name the adapted modules in the order of a forward's visits, layer by layer."""
    paths = []
    for step in model.plan.steps:
        owner = model.plan.layers[step.layer].kv_owner
        places = {
            "query": f"blocks.{step.layer}.attention.query",
            "key": f"blocks.{owner}.attention.key",
            "value": f"blocks.{owner}.attention.value",
            "out": f"blocks.{step.layer}.attention.out",
            "mlp": f"blocks.{step.layer}.mlp",
        }
        paths += [path for target, path in places.items() if target in ttt.targets]
    head = "head" if model.plan.spec.head is None else "head.output"
    return [*paths, *([head] if "head" in ttt.targets else [])]
