"""Two real steps: every parameter is in one group, gets a gradient and moves; one graph."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch._dynamo import reset
from torch._dynamo.exc import TorchDynamoException
from torch.fx import GraphModule

from trainer.errors import UsageError
from trainer.liveness.probe import SEED, awake, not_checked, rule, text
from trainer.model.build import build
from trainer.model.fake_quant import FakeQuants
from trainer.model.gpt import GPT
from trainer.optim.averages import AverageBank
from trainer.optim.groups import Optimizers
from trainer.results import Rule
from trainer.specs.task import TrainTask
from trainer.specs.train import ema_entry

MAX_NAMED = 6


def step_rules(task: TrainTask) -> list[Rule]:
    """Run the first steps of a training: one-group, gradient, update and averages.

    Without each parameter in one group there is nothing to step, and that rule comes alone.
    """
    held = one_group(task)
    if held.verdict == "fail":
        return [held]
    model = build(task.model, seed=SEED)
    optimizers = Optimizers(model, task.train.optimizer)
    if task.train.qat is not None:
        FakeQuants(model, task.train.qat)  # acts from the first step, or later, as in a training
    averages = AverageBank(model, task.train.averages)
    parameters = dict(model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with_gradient: set[str] = set()
    tokens, num_steps = text(task.model), _num_steps(task)
    for step in range(num_steps):
        model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
        with_gradient |= {name for name, p in parameters.items() if _moves(p.grad)}
        optimizers.step(step, 1.0)
        averages.update((step + 1) * _update_every(task), 0.0, 1.0)
    moved = {name for name, start in before.items() if _moves(parameters[name] - start)}
    return [
        held,
        _all_of("gradient", parameters, with_gradient, num_steps),
        _all_of("update", parameters, moved, num_steps),
        _averages(averages, before),
    ]


def one_group(task: TrainTask) -> Rule:
    """Every parameter has a role and is in exactly one optimizer."""
    try:
        held = Optimizers(build(task.model), task.train.optimizer)
    except UsageError as error:
        return rule("one-group", [str(error)], "")
    return rule("one-group", [], f"{len(held.parameters)} parameters, each in one optimizer")


def _num_steps(task: TrainTask) -> int:
    """Return how many steps it takes until a gradient has reached every parameter.

    In the first one the output projections, which start at zero, let none through; a head that
    starts at zero lets none reach even these.
    """
    return 2 if task.model.head is None else 3


def _update_every(task: TrainTask) -> int:
    """Return a number of steps after which both the shadows and the snapshots are due."""
    swa = task.train.averages.swa
    return task.train.averages.ema_every * (1 if swa is None else swa.every)


def _moves(tensor: Tensor | None) -> bool:
    """Whether a tensor is finite and not all zero: a table's gradient has only the rows read."""
    return tensor is not None and bool(tensor.isfinite().all() and tensor.count_nonzero())


def _all_of(name: str, parameters: Iterable[str], alive: set[str], num_steps: int) -> Rule:
    every = list(parameters)
    dead = [each for each in every if each not in alive]
    more = f" and {len(dead) - MAX_NAMED} more" if len(dead) > MAX_NAMED else ""
    faults = [f"no {name} after {num_steps} steps: {', '.join(dead[:MAX_NAMED])}{more}"]
    detail = f"every one of {len(every)} parameters after {num_steps} steps"
    return rule(name, faults if dead else [], detail)


def _averages(averages: AverageBank, start: Mapping[str, Tensor]) -> Rule:
    """Every average has left the start and is not the raw weights either."""
    banked = averages.entries()
    raw = banked.pop("raw")
    wanted = [*map(ema_entry, averages.spec.decays()), *(["swa"] if averages.spec.swa else [])]
    if not wanted:
        return not_checked("averages", "the recipe keeps none")
    faults = [f"{entry} is missing from the bank" for entry in wanted if entry not in banked]
    faults += [
        f"{entry} is the {what}"
        for entry, state in banked.items()
        for what, other in (("raw weights", raw), ("start", start))
        if all(torch.equal(state[name], other[name]) for name in raw)
    ]
    return rule("averages", faults, f"neither the start nor the raw weights: {', '.join(wanted)}")


def compiled_rules(task: TrainTask) -> list[Rule]:
    """Steps of one shape share one graph, without a break; fake quantization flips within it."""
    graphs: list[GraphModule] = []

    def count(graph: GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    qat, tokens = task.train.qat, text(task.model)
    model = awake(task.model).train()
    fakes = None if qat is None else FakeQuants(model, qat)
    if fakes is not None:
        fakes.strength.fill_(0.0)
    reset()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    try:
        plain = _step(compiled, tokens)
        if fakes is not None:
            fakes.turn_on(1)
        flipped = _step(compiled, tokens)
        _descend(model)
        _step(compiled, tokens)
    except TorchDynamoException as error:
        fault = f"not one graph: {str(error).strip().splitlines()[0]}"
        return [not_checked("qat", "the step does not compile"), _one_graph([fault])]
    finally:
        reset()
    faults = [f"{len(graphs)} graphs were built for steps of one shape"] if len(graphs) != 1 else []
    if fakes is None:
        why = "the recipe trains without fake quantization"
        return [not_checked("qat", why), _one_graph(faults)]
    return [_qat(fakes, float((plain - flipped).abs().max()), faults), _one_graph(faults)]


def _one_graph(faults: list[str]) -> Rule:
    return rule("no-recompilation", faults, "three steps, one graph")


def _step(compiled: Callable[[Tensor, Tensor], Tensor], tokens: Tensor) -> Tensor:
    """Run one step's forward and backward; return the losses."""
    found = compiled(tokens[:, :-1], tokens[:, 1:])
    found.mean().backward()
    return found.detach()


def _qat(fakes: FakeQuants, change: float, faults: list[str]) -> Rule:
    share = fakes.share_on_grid()
    faults = list(faults)
    if not change > 0.0:
        faults.append("turning it on changes no training loss")
    if share < 1.0:
        faults.append(f"only {share:.4f} of the weights are on their grid once it is on")
    detail = (
        f"{len(fakes.linears)} matrices on their grids; turning it on moves a loss by "
        f"{change:.1g} nats within one graph"
    )
    return rule("qat", faults, detail)


@torch.no_grad()
def _descend(model: GPT) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter -= 0.01 * parameter.grad
            parameter.grad = None
