"""What a training by steps does at every step, and how two of them share steps: a slow twin.

Written out step by step, without the events, lines and states of `service.tree`.
"""

from dataclasses import replace
from typing import Any

from service.tree import Tree
from trainer.optim.schedule import has_begun, lr_scale, progress
from trainer.specs.train import TrainSpec


def acts(train: TrainSpec, step: int) -> tuple[Any, ...]:
    """All that sets what step `step` does, apart from what acts from the start."""
    scale, share_done = lr_scale(train, step, 0.0), progress(train, step, 0.0)
    qat, swa = train.qat, train.averages.swa
    is_on = qat is not None and (qat.start is None or has_begun(qat.start, scale, share_done))
    fake_quant = replace(qat, start=None) if qat is not None and is_on else None
    snapshot = (
        swa is not None and (step + 1) % swa.every == 0 and has_begun(swa.start, scale, share_done)
    )
    return scale, fake_quant, snapshot


def first_difference(one: TrainSpec, other: TrainSpec) -> int:
    """The first step at which two trainings act differently or one of them is over."""
    last = min(one.iterations, other.iterations)
    for step in range(last):
        if acts(one, step) != acts(other, step):
            return step
    return last


def runs_of(tree: Tree, key: str, iterations: int) -> list[tuple[str, int, int]]:
    """The runs that compute a training, in order: the trunk's id or its own key, from, to."""
    by_state = {state.id: trunk for trunk in tree.trunks for state in trunk.states}
    steps = {s.id: s.departure.step or 0 for trunk in tree.trunks for s in trunk.states}
    runs, run, end, branch = [], key, iterations, tree.branches.get(key)
    while branch is not None:
        runs.insert(0, (run, steps[branch], end))
        trunk = by_state[branch]
        run, end, branch = f"trunk {trunk.id}", steps[branch], trunk.parent
    return [(run, 0, end), *runs]


def computed_steps(tree: Tree, iterations: dict[str, int]) -> int:
    """How many steps the tree computes: each step of each run once."""
    steps = {
        (run, step)
        for key, last in iterations.items()
        for run, first, end in runs_of(tree, key, last)
        for step in range(first, end)
    }
    return len(steps)
