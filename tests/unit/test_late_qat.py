"""Fake quantization in a whole training: when it begins, and that it is proved to act."""

import json
from dataclasses import replace

import pytest
import torch

from tests import tiny
from tests.models import assert_same_banks
from trainer.errors import TrainingError
from trainer.model.build import build
from trainer.results import TrainResult
from trainer.run import check_parity, load_training, train
from trainer.runtime.clock import Clock
from trainer.runtime.distributed import Ranks
from trainer.specs.recipe import Observe
from trainer.specs.task import train_task
from trainer.train import loop
from trainer.train.journal import Journal
from trainer.train.late_qat import LateQat
from trainer.train.runner import StepRunner
from trainer.train.state import TrainState

ALONE = Ranks()
BITS = {"mlp_bits": 5, "attention_bits": 6}
# The micro recipe warms down over the last 4 of 12 steps: 1, 0.75, 0.5, 0.25.
LATE = BITS | {"start": {"lr_scale": 0.6}}


def task_of(qat, **values):
    paths = {path.replace("__", "."): value for path, value in values.items()}
    return train_task(tiny.recipe({"train.qat": qat} | paths))


def journal_of(folder, series):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    points = [json.loads(line) for line in lines]
    return {point["step"]: point[series] for point in points if series in point}


@pytest.fixture(scope="module")
def trained(tiny_dataset, tmp_path_factory):
    """Train the micro recipe with each kind of fake quantization; return folder and result."""
    made = {}
    for name, qat in (("never", None), ("late", LATE), ("always", BITS)):
        folder = tmp_path_factory.mktemp(name)
        task = task_of(qat, observe__log_every=1)
        made[name] = folder, train(task, tiny_dataset, folder, ALONE)
    return made


def test_a_training_says_when_its_weights_came_to_be_rounded(trained):
    starts = {name: result.qat_start_step for name, (_, result) in trained.items()}

    assert starts == {"never": None, "late": 10, "always": 0}
    assert load_training(trained["late"][0])[1].qat_start_step == 10


def test_a_late_start_leaves_what_came_before_and_changes_what_comes_after(trained):
    plain, late = (journal_of(trained[name][0], "train/loss") for name in ("never", "late"))

    assert [plain[step] for step in range(1, 11)] == [late[step] for step in range(1, 11)]
    assert plain[11] != late[11]
    assert plain[12] != late[12]


def test_from_step_0_even_the_first_losses_that_weights_bear_on_differ(trained):
    plain, always = (journal_of(trained[name][0], "train/loss") for name in ("never", "always"))

    assert plain[1] == always[1]  # every branch ends in zeros, which are on any grid
    assert plain[2] != always[2]


def test_the_journal_shows_the_weights_going_onto_the_grid(trained):
    shares = journal_of(trained["late"][0], "qat/on_grid")

    assert list(shares) == [10, 11]
    assert shares[10] < 0.5
    assert shares[11] == 1.0
    assert not journal_of(trained["always"][0], "qat/on_grid")


def test_the_journal_shows_what_a_step_takes_before_and_after(tiny_dataset, tmp_path):
    train(task_of(LATE, observe__log_every=4), tiny_dataset, tmp_path, ALONE)

    paces = journal_of(tmp_path, "train/step_s")

    assert list(paces) == [4, 8, 10, 12]  # at 10 it came on
    assert min(paces.values()) > 0


def test_a_start_can_be_a_share_of_the_run(tiny_dataset, tmp_path):
    task = task_of(BITS | {"start": {"progress": 0.25}}, train__warmup_steps=2)

    result = train(task, tiny_dataset, tmp_path, ALONE)

    assert result.qat_start_step == 3


def test_scores_are_of_the_plain_weights(trained, tiny_dataset, tmp_path):
    parity = check_parity(trained["always"][0], tiny_dataset, tmp_path, ALONE)

    assert parity.rule.verdict == "pass"
    assert parity.fresh_bpb == pytest.approx(trained["always"][1].parity_bpb, abs=1e-9)


def test_warm_up_leaves_it_off(trained, tiny_dataset, tmp_path):
    result = train(task_of(LATE, train__warmup_steps=3), tiny_dataset, tmp_path, ALONE)

    assert result.qat_start_step == 10
    assert_same_banks(trained["late"][0], tmp_path)


@pytest.mark.parametrize(("checkpoint_every", "steps_computed"), [(9, 3), (11, 1)])
def test_a_resumed_training_has_the_same_bits_whether_it_was_on_or_not(
    trained, tiny_dataset, tmp_path, checkpoint_every, steps_computed
):
    task = replace(task_of(LATE), observe=Observe(checkpoint_every=checkpoint_every))
    train(task, tiny_dataset, tmp_path, ALONE)
    (tmp_path / "result.json").unlink()
    loop.train(task, tiny_dataset, tmp_path, ALONE)  # leaves its checkpoint

    resumed = train(task, tiny_dataset, tmp_path, ALONE)

    assert (resumed.steps_computed, resumed.qat_start_step) == (steps_computed, 10)
    assert_same_banks(trained["late"][0], tmp_path)


def test_results_from_before_it_existed_can_still_be_read(trained):
    result = trained["late"][1]

    kept = {name: getattr(result, name) for name in result.__slots__ if name != "qat_start_step"}

    assert TrainResult(**kept) == replace(result, qat_start_step=None)


@pytest.fixture
def begin(tiny_dataset, tmp_path):
    """Train one plain step; return what the loop holds when the start comes."""
    task = task_of(LATE)
    state = TrainState(task, ALONE, Clock())
    runner = StepRunner(task, tiny_dataset, state, ALONE)
    runner.step(0, 1.0)
    state.step = 1
    journal = Journal(tmp_path / "metrics.jsonl", writes=True)
    return state, runner, LateQat(task.train.qat, state, runner, journal)


def test_before_its_start_nothing_comes_on(begin):
    state, _, late = begin

    late.turn_on_if_due(0.6, 0.9)

    assert state.fake_quants.start_step is None


def test_the_proof_moves_no_weight_and_leaves_no_gradient(begin):
    state, _, late = begin
    before = state.snapshot()["model"]

    late.turn_on_if_due(0.59, 0.9)

    assert state.fake_quants.start_step == 1
    assert all(torch.equal(t, before[name]) for name, t in state.model.state_dict().items())
    assert all(parameter.grad is None for parameter in state.model.parameters())


def test_a_switch_that_its_modules_do_not_share_fails_the_training(begin):
    state, _, late = begin
    for linear in state.fake_quants.linears:  # as moving the model to a device would
        linear.weight_edit.strength = linear.weight_edit.strength.clone()

    with pytest.raises(TrainingError, match=r"came on before step 1 but does not act: .* grid"):
        late.turn_on_if_due(0.1, 0.9)


def test_a_forward_that_the_switch_does_not_reach_fails_the_training(begin):
    state, runner, late = begin
    stale = build(state.model.plan.spec, seed=0)
    stale.load_state_dict(state.model.state_dict())
    runner.forward = stale  # as a graph that was traced without the switch would

    with pytest.raises(TrainingError, match=r"loss of one micro-batch .* grid .* to 1\.0000"):
        late.turn_on_if_due(0.1, 0.9)


def test_one_module_left_behind_fails_the_training(begin):
    state, _, late = begin
    left = state.fake_quants.linears[0].weight_edit
    left.strength = left.strength.clone()

    with pytest.raises(TrainingError, match="does not act"):
        late.turn_on_if_due(0.1, 0.9)


def test_a_training_that_ends_before_its_late_parts_says_so(tiny_dataset, tmp_path, caplog):
    # By wall clock only the end shows that the time never came.
    clock = {"train.max_clock_s": 600.0, "train.schedule.basis": "wallclock"}
    start = {"progress": 0.99}
    qat = {"train.qat": BITS | {"start": start}, "train.averages.swa": {"start": start}}

    result = train(train_task(tiny.recipe(clock | qat)), tiny_dataset, tmp_path, ALONE)

    said = [record.message for record in caplog.records if "as without it" in record.message]
    assert (result.qat_start_step, "swa" in result.entries) == (None, False)
    assert [line.partition(" in ")[0] for line in said] == [
        "train.qat.start never came",
        "train.averages.swa took no snapshot",
    ]
