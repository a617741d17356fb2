"""What a sweep runs next, before and after crashes, and how far results are over its limits."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from service.choices import Choices, top_points
from service.clocks import load_policy
from service.identity import Inputs
from service.ledger import Ledger, SweepView
from service.limits import over_limits, settle_ranked
from service.plan import make_plan, plan_training
from service.policies import verdict
from service.recorder import Recorder
from service.states import State
from service.store import Store
from service.sweep import Constraint, load_sweep
from service.talk import Talk

CAP = (Constraint("artifact_bytes", 1_000.0), Constraint("audit", None))


def view(*finals):
    seen = SweepView(started={"spec": {"seeds": {"search": [7, 8]}}})
    for number, (n, seed, bpb, facts) in enumerate(finals):
        event = {
            "event": "final_scored",
            "at": float(number),
            "final": str(number),
            "point": {"n": n},
            "seed": seed,
            "phase": "search",
            "state": "succeeded",
            "result": {"score": {"val_bpb": bpb}},
        }
        seen.apply(event | facts)
    return seen


def test_the_points_with_the_lowest_mean_over_their_seeds_are_confirmed():
    seen = view(
        (1, 7, 2.0, {}), (1, 8, 2.4, {}), (2, 7, 2.1, {}), (2, 8, 2.2, {}), (3, 7, 9.0, {}),
        (3, 8, 9.0, {}),
    )  # fmt: skip
    assert top_points(seen, 1) == [({"n": 2}, False)]
    assert top_points(seen, 2) == [({"n": 2}, False), ({"n": 1}, False)]


def test_a_point_with_a_seed_that_does_not_count_is_not_confirmed_before_a_whole_one():
    seen = view(
        (1, 7, 2.0, {}), (1, 8, 2.0, {"state": "infeasible"}), (2, 7, 2.5, {}), (2, 8, 2.5, {})
    )
    assert top_points(seen, 2) == [({"n": 2}, False)]


def test_what_was_confirmed_already_does_not_change_what_is_confirmed():
    confirmed = (2, 9, 1.0, {"phase": "confirm"})
    assert top_points(view((1, 7, 2.0, {}), (2, 7, 2.1, {}), confirmed), 1) == [({"n": 1}, False)]


def test_a_final_that_its_own_confirmation_took_up_still_counts_for_the_search():
    taken_up = {"phase": "confirm"}
    before = view((1, 7, 2.0, {}), (2, 7, 2.1, {}))
    after = view((1, 7, 2.0, taken_up), (2, 7, 2.1, {}), (1, 9, 5.0, taken_up))
    assert top_points(after, 1) == top_points(before, 1) == [({"n": 1}, False)]


def test_a_fitted_final_and_the_one_that_was_over_the_cap_are_two_points():
    seen = view((1, 7, 2.0, {"fitted": True}), (1, 7, 1.9, {"state": "infeasible"}))
    assert top_points(seen, 1) == [({"n": 1}, True)]


def test_a_sweep_without_a_feasible_final_confirms_nothing():
    assert top_points(view((1, 7, 2.0, {"state": "illegal"})), 1) == []


def test_a_ranked_final_over_the_cap_is_infeasible_with_its_overshoot():
    assert settle_ranked({"artifact_bytes": 1_000}, CAP) == (State.SUCCEEDED, None)
    assert settle_ranked({"artifact_bytes": 1_001}, CAP) == (
        State.INFEASIBLE,
        "artifact_bytes 1,001 > 1,000, over by 1",
    )


def test_how_far_a_result_is_over_its_limits_is_told_as_shares_of_them():
    training = {"clock_s": {"train": 300.0, "validate": 50.0}}
    final = {
        "artifact_bytes": 1_100,
        "finalize_clock_s": 5.0,
        "score": {"val_bpb": 2.0, "eval_clock_s": 30.0},
        "audit": [{"verdict": "fail"}],
    }
    limits = (*CAP, Constraint("train_clock_s", 600.0), Constraint("val_bpb", 1.0))

    over = over_limits(final, training, limits, load_policy())

    assert over == {
        "artifact_bytes": pytest.approx(0.1),
        "train_clock_s": pytest.approx(-0.5),
        "val_bpb": pytest.approx(1.0),
        "audit": 1.0,
    }
    ranked = {"artifact_bytes": 500, "finalize_clock_s": 5.0, "holdout_bpb": 2.0}
    assert over_limits(ranked, training, limits, load_policy()) == {
        "artifact_bytes": pytest.approx(-0.5),
        "train_clock_s": pytest.approx(-0.5),
    }
    assert over_limits({}, training, limits, load_policy()) == {
        "train_clock_s": pytest.approx(-0.5)
    }


def test_a_clock_policy_of_the_users_own_decides_what_counts(tmp_path: Path):
    policy = tmp_path / "clocks.yaml"
    shipped = Path("service/clocks.yaml").read_text()
    policy.write_text(shipped.replace("validate:\n    clock: none", "validate:\n    clock: train"))
    training = {"clock_s": {"train": 300.0, "validate": 50.0}}
    limits = (Constraint("train_clock_s", 700.0),)

    assert over_limits({}, training, limits, load_policy(str(policy)))["train_clock_s"] == (
        pytest.approx(-0.5)
    )


SWEEP = """\
name: chosen
recipe: tiny
space:
  train.optimizer.matrix.lr: {min: 0.001, max: 0.1, scale: log}
  final.prune.ratio: {values: [0.0, 0.1]}
search:
  train: {method: tpe, num: 3, startup: 3}
  final: {rank_on: holdout, top: 1, fit: true}
seeds: {search: [7, 8], confirm: [8, 9]}
constraints: [artifact_bytes <= 1_000, audit == pass]
"""
RESULT = {"parity_bpb": 2.0, "clock_s": {"train": 1.0}, "steps_computed": 120}
RANKED = {"holdout_bpb": 2.5, "finalize_clock_s": 1.0, "artifact_bytes": 900}


class Run:
    """One run of a sweep over a ledger that outlives it, with the trainings told by hand."""

    def __init__(self, root: Path) -> None:
        file = root / "sweep.yaml"
        file.write_text(SWEEP)
        sweep = load_sweep(file)
        self.inputs = Inputs("sha256:0", "code", 1024)
        self.plan = make_plan(sweep, self.inputs, str(file))
        self.ledger = Ledger(root / "events.jsonl")
        store, talk = Store(root / "store"), Talk(Console(file=io.StringIO()))
        self.begun = dict(self.ledger.view.begun)
        spec = {"seeds": {"search": [7, 8]}}
        self.ledger.append("sweep_started", sweep_id="s", spec=spec, num_finals=0)
        self.recorder = Recorder(self.ledger, store, talk, sweep.constraints, load_policy())
        self.choices = Choices(sweep, self.plan, self.inputs, str(file), self.recorder)
        self.trainings = self.choices.trainings(list(self.begun.values()))

    def begin(self):
        training = self.trainings.next()
        if training is not None:
            self.recorder.expect(training)
            self.recorder.training_started(training)
        return training

    def end(self, training, state="succeeded", **facts):
        result = RESULT if state == "succeeded" else None
        outcome = {"state": state, "reason": None, "cached": False, "result": result, **facts}
        self.recorder.training_finished(training, outcome)

    def die(self, root: Path) -> "Run":
        self.ledger.close()
        self.__init__(root)
        return self


@pytest.fixture
def run(tmp_path: Path):
    made = Run(tmp_path)
    yield made
    made.ledger.close()


def told(runs):
    return [(training.point["train.optimizer.matrix.lr"], training.seed) for training in runs]


def drain(run):
    done = []
    while (training := run.begin()) is not None:
        run.end(training)
        done.append(training)
    return done


def test_a_search_that_is_killed_between_two_seeds_trains_the_other_one_first(run, tmp_path: Path):
    other = Run(tmp_path_of(tmp_path, "whole"))
    whole = told(drain(other))
    other.ledger.close()
    run.end(first := run.begin())

    resumed = told(drain(run.die(tmp_path)))

    assert told([first]) + resumed == whole
    assert len(whole) == 6


def tmp_path_of(root: Path, name: str) -> Path:
    folder = root / name
    folder.mkdir()
    return folder


@pytest.mark.parametrize("state", ["cancelled", "failed"])
def test_what_ended_without_a_result_is_tried_again_by_the_next_run(run, tmp_path: Path, state):
    lost = run.begin()
    run.end(lost, state, reason="gone")

    resumed = drain(run.die(tmp_path))

    assert resumed[0].id == lost.id
    assert len(resumed) == 6


def test_two_crashes_in_a_row_forget_nothing_that_was_under_way(run, tmp_path: Path):
    lost = run.begin()
    again = run.die(tmp_path).die(tmp_path)  # the second died before it started anything
    assert told([again.begin()]) == told([lost])


def rank(run, final, state="succeeded", num_bytes=900):
    result = {**RANKED, "artifact_bytes": num_bytes} if state != "failed" else None
    outcome = {"final": final.id, "kind": "rank", "cached": False, "occupied_s": 1.0}
    fate = {"state": "failed", "reason": "x"} if result is None else {"result": result}
    run.recorder.expect(final)
    run.recorder.final_ended(outcome | fate)


def test_finals_over_the_cap_are_seen_and_fitted_though_they_were_only_ranked(run, tmp_path: Path):
    for training in (run.begin(), run.begin()):
        run.end(training)
    finals = list(iter(run.choices.finals().next, None))
    for final, num_bytes in zip(finals, (900, 1_001, 900, 1_200), strict=True):
        rank(run, final, num_bytes=num_bytes)
    run.recorder.settle_unranked()

    settled = run.ledger.view.finals
    assert {settled[finals[i].id]["state"] for i in (1, 3)} == {"infeasible"}
    assert "over by 200" in settled[finals[3].id]["reason"]
    assert len(run.choices.fits()) == 2
    chosen, passed = run.choices.ranked()
    assert [final.id for final in chosen] == [min(finals[0].id, finals[2].id)]
    assert [place for _, place, _ in passed] == [2]


def test_a_rank_that_failed_makes_the_sweep_fail(run, tmp_path: Path):
    run.end(run.begin())
    rank(run, run.choices.finals().next(), state="failed")
    run.recorder.settle_unranked()
    assert verdict(run.ledger.view) == State.FAILED


def test_a_bank_of_the_confirmation_is_no_bank_of_the_search(run, tmp_path: Path):
    run.end(run.begin())
    number = len(list(iter(run.choices.finals().next, None)))
    run.recorder.phase = "confirm"
    confirmed = plan_training(
        run.choices.sweep, run.inputs, {"train.optimizer.matrix.lr": 0.02}, 9, "here"
    )
    run.end(confirmed)
    assert len(list(iter(run.choices.finals().next, None))) == number
