"""The sweep file: what it may say, and what it is told when it says something else."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from service.sweep import Constraint, load_sweep, parse_constraint
from trainer.errors import UsageError
from trainer.protocol import ARTIFACT_BYTES_CAP

BASE: dict[str, Any] = {
    "name": "trial",
    "recipe": "tiny",
    "space": {
        "train.schedule.warmdown_iters": {"phase": "train", "values": [10, 20]},
        "final.prune.ratio": {"phase": "final", "min": 0.0, "max": 0.2, "num": 3},
    },
}


@pytest.fixture
def sweep_file(tmp_path: Path):
    def write(**changes: Any) -> Path:
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({**BASE, **changes}))
        return path

    return write


def test_a_sweep_without_constraints_gets_the_cap_and_the_audit(sweep_file):
    sweep = load_sweep(sweep_file())

    assert sweep.constraints == (
        Constraint("artifact_bytes", ARTIFACT_BYTES_CAP),
        Constraint("audit", None),
    )
    assert sweep.cap_bytes == ARTIFACT_BYTES_CAP


def test_underscores_are_accepted_in_a_byte_cap(sweep_file):
    sweep = load_sweep(sweep_file(constraints=["artifact_bytes <= 400_000"]))

    assert sweep.cap_bytes == 400_000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resorces": {"workers": 2}}, ["resorces: unknown key", "did you mean resources?"]),
        ({"constraints": ["artifact_bytes <= 16 MiB"]}, ["constraints[0]", "'16 MiB'", "decimal"]),
        ({"constraints": ["artifact_bites <= 16"]}, ["constraints[0]", "not a constraint"]),
        ({"space": {"final.prun.ratio": {"values": [0.1]}}}, ["final.prun.ratio", "prune?"]),
        ({"space": {"final.prune.ratio": {"values": [1.5]}}}, ["ratio=1.5", "outside [0, 1)"]),
        ({"space": {"final.prune.ratio": {"min": 0.1, "max": 1.5}}}, ["ratio=1.5", "outside"]),
        ({"space": {"final.prune": {"values": [0.1]}}}, ["is a part", "final.prune.ratio"]),
        ({"space": {"train.seed": {"values": [1, 2]}}}, ["not an axis", "seeds.search"]),
        (
            {"space": {"final.prune.ratio": {"phase": "train", "values": [0.1]}}},
            ["phase train is wrong", "phase final"],
        ),
        ({"space": {"final.prune.ratio": {}}}, ["values", "min and max"]),
        ({"recipe": "tinny"}, ["no recipe 'tinny'", "did you mean tiny?"]),
        ({"overrides": {"train.iteration": 5}}, ["train.iteration", "did you mean iterations?"]),
        ({"name": "Has Spaces"}, ["name=", "lower-case"]),
        ({"search": {"final": {"method": "random"}}}, ["per_bank"]),
        ({"seeds": {"search": []}}, ["search is empty"]),
        ({"seeds": {"search": [-1]}}, ["seed below 0"]),
        ({"search": {"final": {"seed": -1}}}, ["seed=-1"]),
        ({"search": {"train": {"method": "tpe"}}}, ["num goes with random and tpe"]),
        ({"search": {"train": {"stop": {"kind": "asha", "first_step": 0}}}}, ["first_step=0"]),
        (
            {"search": {"train": {"stop": {"kind": "asha", "first_step": 9, "reduction": 1}}}},
            ["reduction=1", "at least 2"],
        ),
        (
            {
                "search": {
                    "train": {"stop": {"kind": "reference", "training": "x", "margin_bpb": -1}}
                }
            },
            ["margin_bpb=-1"],
        ),
        ({"search": {"final": {"rank_on": "holdout"}}}, ["top goes with rank_on: holdout"]),
        ({"search": {"confirm": {"top": 0}}}, ["top=0"]),
        ({"seeds": {"confirm": [3, 3]}}, ["confirm has a repeat"]),
        ({"gate": {"baseline": "pr414"}}, ["list seeds.confirm"]),
        (
            {
                "seeds": {"confirm": [3]},
                "gate": {"baseline": "b", "mode": "frontier", "alpha": 0.5},
            },
            ["mode=frontier", "go with strict"],
        ),
        ({"budget": {}}, ["give gpu_hours, usd or deadline_hours"]),
        ({"budget": {"usd": 5}}, ["usd=5", "needs usd_per_gpu_hour"]),
        ({"budget": {"gpu_hours": 0}}, ["gpu_hours=0"]),
        ({"limits": {"max_failed": 0}}, ["max_failed=0"]),
        ({"require": {"free_disk_gb": -1}}, ["free_disk_gb=-1"]),
        ({"require": {"attention": "flsh"}}, ["require.attention"]),
        ({"resources": {"gang": "hot"}}, ["resources.gang"]),
        ({"version": 2}, ["version"]),
    ],
)
def test_a_fault_gets_one_line_with_file_field_and_what_to_do(sweep_file, changes, words):
    path = sweep_file(**changes)

    with pytest.raises(UsageError) as caught:
        load_sweep(path)

    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    assert all(word in message for word in words), message


def test_a_clock_policy_that_is_missing_or_broken_is_refused_with_the_sweep(sweep_file, tmp_path):
    policy = tmp_path / "clocks.yaml"

    with pytest.raises(UsageError, match=r"clocks\.yaml: No such file"):
        load_sweep(sweep_file(clocks=str(policy)))
    policy.write_text("phases: {train: {clock: train, why: the steps}}")
    with pytest.raises(UsageError, match=r"clocks\.yaml: phases"):
        load_sweep(sweep_file(clocks=str(policy)))


def test_two_faults_get_two_lines(sweep_file):
    space = {"final.prun.ratio": {"values": [0]}, "model.dmi": {"values": [64]}}

    with pytest.raises(UsageError) as caught:
        load_sweep(sweep_file(space=space))

    assert len(str(caught.value).splitlines()) == 2


def test_an_axis_may_complete_a_recipe_that_is_unfit_without_it(sweep_file):
    # The recipe's own warmdown of 80 does not fit into 40 iterations; every axis value does.
    sweep = load_sweep(sweep_file(overrides={"train.iterations": 40}))

    assert sweep.recipe_at({"train.schedule.warmdown_iters": 10}, 1, "here").train.iterations == 40


def test_command_line_values_win_over_overrides(sweep_file):
    path = sweep_file(overrides={"train.iterations": 100})

    sweep = load_sweep(path, ["train.iterations=50", "resources.workers=3"])

    assert sweep.recipe_at({"train.schedule.warmdown_iters": 10}, 1, "x").train.iterations == 50
    assert sweep.spec.resources.workers == 3


def test_the_command_line_names_other_data_whether_or_not_the_file_does(sweep_file):
    for changes in ({}, {"data": {"name": "theirs"}}):
        sweep = load_sweep(sweep_file(**changes), ["data.name=mine"])

        assert sweep.data.name == "mine"


def test_a_command_line_value_for_an_axis_is_refused(sweep_file):
    with pytest.raises(UsageError, match="also an axis"):
        load_sweep(sweep_file(), ["final.prune.ratio=0.1"])


@pytest.mark.parametrize("text", ["artifact_bytes < 5", "audit == fail", "val_bpb <= low", ""])
def test_a_constraint_that_says_nothing_is_refused(text):
    with pytest.raises(UsageError, match="here: "):
        parse_constraint(text, "here")
