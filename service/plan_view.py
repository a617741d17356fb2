"""A plan as a tree: which steps are computed once, who starts from them, and what that saves."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.tree import Tree as RichTree

from service.forecast import departure_steps, run_steps
from service.labels import knob_names, short_value
from service.plan import Plan, Training
from service.sweep import Sweep
from service.tree import Trunk, expected_steps
from tune_spaces.axes import Axis
from tune_spaces.space import phase_of

MAX_SHOWN = 24  # of the branches of one node, and of the finals' knobs


@dataclass(frozen=True, slots=True)
class Node:
    """One line of a tree, and what stands under it."""

    text: str
    under: list["Node"] = field(default_factory=list["Node"])


def tree_document(
    sweep: Sweep, plan: Plan, seconds_per_step: float | None = None
) -> dict[str, Any]:
    """A plan's stages and their cost as plain data. Steps by wall clock are what is expected."""
    at = departure_steps(plan.trunks, seconds_per_step)
    finals = Counter(final.training for final in plan.finals)
    by_clock = any(state.departure.step is None for t in plan.trunks for state in t.states)
    return {
        "sweep_id": plan.sweep_id,
        "trunks": [_trunk(trunk, at) for trunk in plan.trunks],
        "trainings": [
            {
                "id": training.id,
                "point": training.point,
                "seed": training.seed,
                "branch": training.branch,
                "first_step": at[training.branch] if training.branch else 0,
                "steps": expected_steps(training.task.train, seconds_per_step),
                "finals": finals[training.id],
            }
            for training in plan.trainings
        ],
        "num_trainings": plan.num_trainings,
        "num_finals": plan.num_finals,
        "workers": sweep.spec.resources.workers,
        "is_estimate": by_clock or plan.num_trainings != len(plan.trainings),
        **plan.forecast,
    }


def _trunk(trunk: Trunk, at: dict[str, int]) -> dict[str, Any]:
    return {
        "id": trunk.id,
        "parent": trunk.parent,
        "first_step": at[trunk.parent] if trunk.parent else 0,
        "computed_steps": run_steps(trunk, at),
        "seed": trunk.task.train.seed,
        "states": [{"id": state.id, "step": at[state.id]} for state in trunk.states],
    }


def stage_tree(sweep: Sweep, plan: Plan, document: dict[str, Any]) -> Node:
    """The same as a tree for readers: a trunk, its states, and who goes on from each."""
    trainings = {training.id: training for training in plan.trainings}
    takers: dict[str | None, list[Node]] = defaultdict(list)
    for told in document["trainings"]:
        label = _label(sweep, plan, trainings[told["id"]])
        takers[told["branch"]].append(Node(_training_text(told, label)))
    # A trunk comes after its parent, so from the last one back each is whole when it is put in.
    for told in reversed(document["trunks"]):
        states = [
            Node(f"state at step {state['step']:,}", takers[state["id"]])
            for state in told["states"]
        ]
        first, last = told["first_step"], told["first_step"] + told["computed_steps"]
        text = (
            f"trunk {told['id'][:8]}: steps {first:,} to {last:,}, {_count(len(states), 'state')}"
        )
        takers[told["parent"]].insert(0, Node(text, states))
    return Node(f"sweep {plan.sweep_id}", [*takers[None], *_yet_to_come(plan), *_finals(sweep)])


def _label(sweep: Sweep, plan: Plan, training: Training) -> str:
    names = knob_names(plan.varying)
    words = [f"{names[path]}={short_value(value)}" for path, value in training.point.items()]
    if len(sweep.spec.seeds.search) > 1:
        words.append(f"seed={training.seed}")
    return " ".join(words) or "the recipe"


def _training_text(told: dict[str, Any], label: str) -> str:
    kind = "tail" if told["branch"] else "training"
    num = told["steps"] - told["first_step"]
    finals = f", {_count(told['finals'], 'final')}" if told["finals"] else ""
    return f"{kind} {label}: {num:,} steps to {told['steps']:,}{finals}"


def _yet_to_come(plan: Plan) -> list[Node]:
    missing = {
        "training": plan.num_trainings - len(plan.trainings),
        "final": plan.num_finals - len(plan.finals),
    }
    return [
        Node(f"{_count(num, kind)} at points that the search makes as it goes")
        for kind, num in missing.items()
        if num
    ]


def _finals(sweep: Sweep) -> list[Node]:
    """What varies after training."""
    lines = [
        f"{path}: {_values(axis)}"
        for path, axis in sweep.spec.space.items()
        if phase_of(path) != "train"
    ]
    return [Node("finals of each training over", [Node(line) for line in lines])] if lines else []


def _values(axis: Axis) -> str:
    if axis.values is None:
        return f"{short_value(axis.min)} to {short_value(axis.max)}"
    return ", ".join(map(short_value, axis.values))


def cost_lines(document: dict[str, Any], *, has_gpus: bool) -> list[str]:
    """What the plan costs with shared beginnings and without, one line for each measure."""
    about = "about " if document["is_estimate"] else ""
    lines = [
        f"steps: {about}{document['steps']:,} instead of {document['steps_straight']:,} straight, "
        f"{document['saving']:.1%} saved"
    ]
    if "worker_seconds" in document:
        unit = "GPU-seconds" if has_gpus else "worker-seconds"
        with_, without = document["worker_seconds"], document["worker_seconds_straight"]
        lines.append(f"{unit}: about {with_:,.0f} instead of {without:,.0f} straight")
    dropped = document["dropped_points"]
    if any(dropped.values()):
        lines.append(f"dropped by where: {dropped['train']} train, {dropped['final']} final points")
    return lines


def print_tree(sweep: Sweep, plan: Plan, document: dict[str, Any]) -> None:
    """Print the tree and the cost: in lines of guides on a terminal, plain into a pipe or a log."""
    tree, console = stage_tree(sweep, plan, document), Console(highlight=False)
    if console.is_terminal:
        console.print(rich_tree(tree))
    lines = [] if console.is_terminal else plain_lines(tree)
    for line in [*lines, *cost_lines(document, has_gpus=sweep.spec.resources.gpus_per_worker > 0)]:
        console.print(line, soft_wrap=True, markup=False)


def plain_lines(node: Node, indent: str = "") -> list[str]:
    """A tree as lines of text, each level two spaces further in."""
    lines = [indent + node.text]
    for child in _shown(node.under):
        lines += plain_lines(child, indent + "  ")
    return lines


def rich_tree(node: Node) -> RichTree:
    """A tree for a terminal."""
    tree = RichTree(escape(node.text))
    for child in _shown(node.under):
        tree.add(rich_tree(child))
    return tree


def _shown(nodes: list[Node]) -> Iterable[Node]:
    if len(nodes) <= MAX_SHOWN:
        return nodes
    return [*nodes[:MAX_SHOWN], Node(f"... and {len(nodes) - MAX_SHOWN:,} more; see -o json")]


def _count(num: int, name: str) -> str:
    return f"{num:,} {name}{'' if num == 1 else 's'}"
