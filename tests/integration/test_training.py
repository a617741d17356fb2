"""A training as a whole: its bank is a function of its task, whatever happens on the way."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.models import assert_same_banks, bank_of
from tests.ticking import trainings_tick
from trainer.codec import to_yaml
from trainer.errors import TrainingError, UsageError
from trainer.run import check_parity, is_trained, load_training, train
from trainer.runtime.distributed import Ranks
from trainer.runtime.tensors import load_tensors, saved_names
from trainer.specs.recipe import Observe
from trainer.specs.task import train_task
from trainer.train import loop

ALONE = Ranks()
LAUNCH_TIMEOUT_S = 480


def task_of(**values):
    """Return the micro training; `a__b=1` stands for the path a.b."""
    paths = {path.replace("__", "."): value for path, value in values.items()}
    return train_task(tiny.recipe(paths))


def journal_of(folder, series):
    """Return what was observed of a series, by step; a repeated step is a failure."""
    seen = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        point = json.loads(line)
        if series in point:
            assert point["step"] not in seen
            seen[point["step"]] = point[series]
    return seen


@pytest.fixture(scope="module")
def straight(tiny_dataset, tmp_path_factory):
    """Train the micro recipe once, without a break."""
    folder = tmp_path_factory.mktemp("straight")
    result = train(task_of(), tiny_dataset, folder, ALONE)
    return folder, result


def test_two_trainings_of_one_task_have_the_same_bits(straight, tiny_dataset, tmp_path):
    train(task_of(), tiny_dataset, tmp_path, ALONE)

    assert_same_banks(straight[0], tmp_path)


def test_another_seed_gives_other_weights(straight, tiny_dataset, tmp_path):
    train(task_of(train__seed=7), tiny_dataset, tmp_path, ALONE)

    with pytest.raises(AssertionError, match=r"^raw "):
        assert_same_banks(straight[0], tmp_path)


def test_a_training_leaves_a_bank_a_result_and_no_checkpoint(straight):
    folder, result = straight

    assert saved_names(folder / "bank") == ["raw", "ema-0.5", "ema-0.9", "swa"]
    assert result.entries == ("raw", "ema-0.5", "ema-0.9", "swa")
    assert (result.steps, result.steps_computed, result.tokens) == (12, 12, 12 * 256)
    assert not (folder / "checkpoint").exists()
    assert load_training(folder)[1] == result


def test_training_lowers_the_validation_score(tiny_dataset, tmp_path):
    task = task_of(train__iterations=60, observe__validate_every=60)

    result = train(task, tiny_dataset, tmp_path, ALONE)

    scores = journal_of(tmp_path, "val/bpb")
    assert scores[0] == result.untrained_val_bpb
    assert scores[60] < 0.75 * scores[0]


def test_a_fresh_model_from_the_bank_scores_as_the_trainer_did(straight, tiny_dataset, tmp_path):
    parity = check_parity(straight[0], tiny_dataset, tmp_path, ALONE)

    assert parity.rule.verdict == "pass"
    assert parity.fresh_bpb == pytest.approx(straight[1].parity_bpb, abs=1e-9)


def test_the_journal_follows_the_schedule_of_the_recipe(straight):
    scales = journal_of(straight[0], "train/lr_scale")

    assert scales == {2: 1.0, 4: 1.0, 6: 1.0, 8: 1.0, 10: 0.75, 12: 0.25}


def test_warmup_steps_change_nothing(straight, tiny_dataset, tmp_path):
    result = train(task_of(train__warmup_steps=3), tiny_dataset, tmp_path, ALONE)

    assert_same_banks(straight[0], tmp_path)
    assert result.clock_s["warmup"] > 0


def test_what_is_observed_changes_nothing(straight, tiny_dataset, tmp_path):
    task = replace(task_of(), observe=Observe(log_every=1, validate_every=5, checkpoint_every=3))

    train(task, tiny_dataset, tmp_path, ALONE)

    assert_same_banks(straight[0], tmp_path)
    assert is_trained(task_of(), tiny_dataset, tmp_path, ALONE)


def test_micro_batches_give_nearly_the_same_losses(straight, tiny_dataset, tmp_path):
    train(task_of(train__micro_batch_tokens=64), tiny_dataset, tmp_path, ALONE)

    whole = journal_of(straight[0], "train/loss")
    assert journal_of(tmp_path, "train/loss") == pytest.approx(whole, abs=1e-4)


def test_micro_batches_that_do_not_fit_are_refused(tiny_dataset, tmp_path):
    with pytest.raises(UsageError, match=r"^train\.micro_batch_tokens=96 does not divide"):
        train(task_of(train__micro_batch_tokens=96), tiny_dataset, tmp_path, ALONE)


def test_a_model_without_a_row_for_some_token_is_refused(tiny_dataset, tmp_path):
    with pytest.raises(UsageError, match=r"^model\.vocab_size=64 is below the 320 tokens"):
        train(task_of(model__vocab_size=64), tiny_dataset, tmp_path, ALONE)


def launch(recipe_file, dataset, out, *launcher):
    return subprocess.Popen(
        [
            *(sys.executable, *launcher, "-m", "trainer", str(recipe_file)),
            *("--data", str(dataset.folder), "--out", str(out)),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_training_killed_in_the_middle_resumes_to_the_same_bits(tiny_dataset, tmp_path):
    recipe = tiny.recipe({"train.iterations": 200, "observe.checkpoint_every": 10})
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    for number in range(9):  # one may be over before we look
        killed = tmp_path / f"out-{number}" / "training"
        worker = launch(tmp_path / "recipe.yaml", tiny_dataset, killed.parent)
        while not any(killed.glob("checkpoint/*/index.json")) and worker.poll() is None:
            time.sleep(0.01)
        worker.kill()
        _, talk = worker.communicate()
        if not (killed / "result.json").exists():
            break
    assert worker.returncode == -signal.SIGKILL, talk

    resumed = train(train_task(recipe), tiny_dataset, killed, ALONE)
    train(train_task(recipe), tiny_dataset, tmp_path / "straight", ALONE)
    assert 0 < resumed.steps_computed < resumed.steps == 200
    assert_same_banks(killed, tmp_path / "straight")
    assert list(journal_of(killed, "train/loss")) == list(range(2, 201, 2))


@pytest.fixture
def interrupted(tiny_dataset, tmp_path):
    """A folder as a crash after the last step leaves it: checkpoints at 3, 6 and 9, no result.

    The oldest is gone already, because two are kept.
    """
    task = replace(task_of(), observe=Observe(checkpoint_every=3))
    train(task, tiny_dataset, tmp_path, ALONE)
    (tmp_path / "result.json").unlink()
    loop.train(task, tiny_dataset, tmp_path, ALONE)
    return task, tmp_path


def damage(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_only_the_two_newest_checkpoints_are_kept(interrupted):
    _, folder = interrupted

    assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == [
        "00000006",
        "00000009",
    ]


@pytest.mark.parametrize(
    ("damaged", "steps_computed"),
    [((), 3), (("00000009",), 6), (("00000006", "00000009"), 12)],
)
def test_a_damaged_checkpoint_falls_back_to_an_older_one(
    straight, interrupted, tiny_dataset, damaged, steps_computed
):
    task, folder = interrupted
    for name in damaged:
        damage(folder / "checkpoint" / name / "state.pt")

    result = train(task, tiny_dataset, folder, ALONE)

    assert result.steps_computed == steps_computed
    assert result.untrained_val_bpb == straight[1].untrained_val_bpb
    assert_same_banks(straight[0], folder)


def test_a_checkpoint_that_was_never_finished_is_passed_over(straight, interrupted, tiny_dataset):
    task, folder = interrupted
    (folder / "checkpoint" / "00000009" / "index.json").unlink()

    assert train(task, tiny_dataset, folder, ALONE).steps_computed == 6
    assert_same_banks(straight[0], folder)


def test_another_tasks_checkpoint_is_not_resumed(interrupted, tiny_dataset, tmp_path_factory):
    task, folder = interrupted
    other = replace(task, train=replace(task.train, batch_tokens=128))
    fresh = tmp_path_factory.mktemp("fresh")

    result = train(other, tiny_dataset, folder, ALONE)

    train(other, tiny_dataset, fresh, ALONE)
    assert result.steps_computed == 12
    assert_same_banks(folder, fresh)
    assert journal_of(folder, "train/loss") == journal_of(fresh, "train/loss")
    assert is_trained(other, tiny_dataset, folder, ALONE)
    assert not is_trained(task, tiny_dataset, folder, ALONE)


def test_the_clock_of_a_resumed_training_goes_on(interrupted, tiny_dataset):
    task, folder = interrupted
    before = load_tensors(folder / "checkpoint" / "00000009", "progress")["clock_s"]

    result = train(task, tiny_dataset, folder, ALONE)

    assert result.train_clock_s > before["train"] > 0


@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_loss_that_is_no_number_stops_the_training_by_its_step(tiny_dataset, tmp_path, log_every):
    task = task_of(train__optimizer__scalar__lr=1e30, observe__log_every=log_every)

    with pytest.raises(TrainingError, match=r"^training diverged: loss \S+ at step \d+; lower"):
        train(task, tiny_dataset, tmp_path, ALONE)

    assert not (tmp_path / "result.json").exists()


def test_a_score_that_is_no_number_stops_the_training_by_its_step(tiny_dataset, tmp_path):
    task = task_of(
        train__optimizer__scalar__lr=1e30, observe__log_every=1000, observe__validate_every=1
    )

    with pytest.raises(TrainingError, match=r"^training diverged: val/bpb \S+ at step 1; lower"):
        train(task, tiny_dataset, tmp_path, ALONE)


def test_the_wall_clock_cap_stops_the_training(tiny_dataset, tmp_path, monkeypatch):
    trainings_tick(monkeypatch)
    task = task_of(
        train__iterations=1_000_000,
        train__max_clock_s=0.3,
        train__schedule__basis="wallclock",
        train__schedule__warmdown_iters=10,
        observe__log_every=1,
    )

    result = train(task, tiny_dataset, tmp_path, ALONE)

    assert 1 < result.steps < 1_000_000
    assert 0.3 <= result.train_clock_s < 0.5
    assert result.steps == result.steps_computed == max(journal_of(tmp_path, "train/loss"))
    assert min(journal_of(tmp_path, "train/lr_scale").values()) < 0.5


def test_bfloat16_trains_on_the_cpu_and_banks_float32(tiny_dataset, tmp_path):
    task = task_of(train__dtype="bfloat16", train__iterations=30)

    result = train(task, tiny_dataset, tmp_path, ALONE)

    scores = journal_of(tmp_path, "val/bpb")
    assert scores[30] < 0.9 * scores[0]
    assert result.parity_bpb == pytest.approx(
        check_parity(tmp_path, tiny_dataset, tmp_path / "parity", ALONE).fresh_bpb, abs=1e-9
    )
    dtypes = {t.dtype for tensors in bank_of(tmp_path).values() for t in tensors.values()}
    assert dtypes == {torch.float32}


def gang_of_two(recipe, dataset, folder):
    """Run the trainer under torchrun on two workers; return its exit status and stderr."""
    (folder / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    gang = launch(folder / "recipe.yaml", dataset, folder / "out", *torchrun)
    _, talk = gang.communicate(timeout=LAUNCH_TIMEOUT_S)
    return gang.returncode, talk


def test_two_workers_see_the_same_batches_as_one(straight, tiny_dataset, tmp_path):
    recipe = tiny.recipe({"observe.checkpoint_every": 4})

    status, talk = gang_of_two(recipe, tiny_dataset, tmp_path)

    assert status == 0, talk
    training = tmp_path / "out" / "training"
    for series in ("train/loss", "val/bpb"):
        one, two = (journal_of(folder, series) for folder in (straight[0], training))
        assert two == pytest.approx(one, abs=1e-4)
    assert load_training(training)[1].world_size == 2


def test_two_workers_begin_to_round_their_weights_at_the_same_step(tiny_dataset, tmp_path):
    qat = {"mlp_bits": 5, "attention_bits": 6, "start": {"lr_scale": 0.6}}
    recipe = tiny.recipe({"train.qat": qat, "train.micro_batch_tokens": 64})
    train(train_task(recipe), tiny_dataset, tmp_path / "alone", ALONE)

    status, talk = gang_of_two(recipe, tiny_dataset, tmp_path)

    assert status == 0, talk
    training = tmp_path / "out" / "training"
    assert load_training(training)[1].qat_start_step == 10
    for series in ("train/loss", "qat/on_grid"):
        one, two = (journal_of(folder, series) for folder in (tmp_path / "alone", training))
        assert two == pytest.approx(one, abs=1e-4)


def test_workers_that_do_not_share_a_batch_evenly_are_refused(tiny_dataset, tmp_path):
    recipe = tiny.recipe({"train.batch_tokens": 32})

    status, talk = gang_of_two(recipe, tiny_dataset, tmp_path)

    assert status != 0
    assert "resources.workers=2 does not divide a batch of 1 sequences" in talk
    assert "ZeroDivisionError" not in talk
