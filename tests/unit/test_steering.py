"""A training asked on its way whether it goes on."""

import json

import pytest

from tests import tiny
from trainer.errors import BackendError, Stopped, TrainingError
from trainer.run import grow_trunk, train
from trainer.runtime.distributed import Ranks
from trainer.specs.task import Departure, train_task

ALONE = Ranks()


def task_of(**observe):
    return train_task(tiny.recipe({"observe": {"log_every": 3, **observe}}))


@pytest.fixture
def asked():
    """A judge that lets everything pass, and what it was asked."""
    questions = []

    def steer(step, val_bpb):
        questions.append((step, val_bpb))

    return steer, questions


def test_a_training_asks_at_every_logged_step_and_after_every_score(tiny_dataset, tmp_path, asked):
    steer, questions = asked

    train(task_of(validate_every=4), tiny_dataset, tmp_path, ALONE, steer=steer)

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["val/bpb"] for line in lines if "val/bpb" in line}
    # 12 is both the last step and one to log and to score: there is nothing left to stop.
    assert questions == [(3, None), (4, scores[4]), (6, None), (8, scores[8]), (9, None)]


def test_a_step_that_is_logged_and_scored_asks_once(tiny_dataset, tmp_path, asked):
    steer, questions = asked

    train(task_of(validate_every=6), tiny_dataset, tmp_path, ALONE, steer=steer)

    assert [(step, bpb is None) for step, bpb in questions] == [(3, True), (6, False), (9, True)]


def test_asking_changes_nothing(tiny_dataset, tmp_path, asked):
    results = [
        train(task_of(), tiny_dataset, tmp_path / name, ALONE, steer=steer)
        for name, steer in (("asked", asked[0]), ("unasked", None))
    ]

    assert results[0].parity_bpb == results[1].parity_bpb
    assert results[0].final_train_loss == results[1].final_train_loss


def test_a_stopped_training_has_its_checkpoint_and_goes_on_from_there(tiny_dataset, tmp_path):
    with pytest.raises(Stopped, match=r"^worst of its rung$") as caught:
        train(
            *(task_of(), tiny_dataset, tmp_path, ALONE),
            steer=lambda step, _: "worst of its rung" if step == 6 else None,
        )

    assert caught.value.reason == "worst of its rung"
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["00000006"]
    assert not (tmp_path / "result.json").exists()
    assert train(task_of(), tiny_dataset, tmp_path, ALONE).steps_computed == 6


def test_a_judge_that_cannot_be_asked_is_no_fault_of_the_training(tiny_dataset, tmp_path):
    def gone(step, val_bpb):
        raise ConnectionError("no route")

    with pytest.raises(BackendError, match=r"^step 3: could not ask .*no route.*; run again$"):
        train(task_of(), tiny_dataset, tmp_path, ALONE, steer=gone)


def test_what_a_judge_says_by_an_error_of_ours_is_kept(tiny_dataset, tmp_path):
    def broken(step, val_bpb):
        raise TrainingError("the curve is another's")

    with pytest.raises(TrainingError, match=r"^the curve is another's$"):
        train(task_of(), tiny_dataset, tmp_path, ALONE, steer=broken)


def test_a_trunk_is_asked_too_but_not_once_its_last_state_is_due(tiny_dataset, tmp_path, asked):
    steer, questions = asked
    task = train_task(
        tiny.recipe(
            {"train.schedule.warmdown_iters": 0, "train.averages.swa": None, "observe.log_every": 2}
        )
    )
    states = [(Departure(step=step), tmp_path / str(step)) for step in (4, 6)]

    grow_trunk(task, tiny_dataset, states, tmp_path / "work", ALONE, steer=steer)
    assert questions == [(2, None), (4, None)]

    late = [(Departure(step=8), tmp_path / "8")]
    with pytest.raises(Stopped):
        grow_trunk(task, tiny_dataset, late, tmp_path / "stopped", ALONE, steer=lambda *_: "enough")
    assert not (tmp_path / "8").exists()
    grow_trunk(task, tiny_dataset, late, tmp_path / "stopped", ALONE)
    assert json.loads((tmp_path / "8" / "result.json").read_text())["steps_computed"] == 6
