"""A sweep's finals as a study of Optuna."""

import copy
import threading
import warnings
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from service.ledger import SweepView, replay
from service.study import importances, plane_study, quiet, settled, study_of
from tests.ledgers import CLIP, EMA, PRUNE, WARMDOWN, Sweep
from tests.showcase import LEVEL, Showcase

HOSTILE = "</script><b>"


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> SweepView:
    return Showcase(tmp_path_factory.mktemp("home")).write()


def written(sweep: Sweep) -> SweepView:
    return replay(sweep.write())


def test_a_trial_is_a_final_in_the_order_they_were_settled(busy: SweepView) -> None:
    events = settled(busy)

    with quiet():
        trials = study_of(busy, events).trials

    assert len(trials) == len(events) == 329
    assert trials[0].value == events[0]["result"]["score"]["val_bpb"]
    assert trials[0].params["warmdown_iters"] == events[0]["point"][WARMDOWN]
    assert [e["seq"] for e in events] == sorted(e["seq"] for e in events)


def test_what_is_over_the_cap_breaks_a_constraint_by_its_bytes(busy: SweepView) -> None:
    events = settled(busy)
    place = next(i for i, event in enumerate(events) if event["state"] == "infeasible")

    with quiet():
        constraints = study_of(busy, events).trials[place].constraints

    num_bytes = events[place]["result"]["artifact_bytes"]
    assert constraints == {"artifact_bytes": num_bytes - 16_000_000, "feasible and legal": 1.0}


def test_an_illegal_final_breaks_a_constraint_and_a_failed_one_has_no_value(
    busy: SweepView,
) -> None:
    events = settled(busy)
    states = [event["state"] for event in events]

    with quiet():
        trials = study_of(busy, events).trials

    illegal, failed = trials[states.index("illegal")], trials[states.index("failed")]
    assert illegal.constraints["feasible and legal"] == 1.0
    assert failed.state == TrialState.FAIL


def test_what_was_stopped_is_pruned(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    with sweep.open() as ledger:
        sweep.start(ledger)
        point = sweep.final_points(sweep.train_points()[0])[0]
        sweep.score(ledger, point, state="stopped", reason="place 9", result=None)

        with quiet():
            (trial,) = study_of(ledger.view, settled(ledger.view)).trials

    assert trial.state == TrialState.PRUNED


def test_a_knob_that_a_point_lacks_is_no_parameter_of_its_trial(busy: SweepView) -> None:
    events = settled(busy)
    place = next(i for i, event in enumerate(events) if LEVEL not in event["point"])

    with quiet():
        trial = study_of(busy, events).trials[place]

    assert "compress.level" not in trial.params


def test_distributions_are_the_spaces_own(tmp_path: Path) -> None:
    view = written(Sweep(tmp_path))
    view.started["spec"]["space"] = {
        WARMDOWN: {"min": 2000, "max": 4000, "scale": "linear"},
        EMA: {"min": 0.99, "max": 0.999, "scale": "log"},
        CLIP: {"values": ["none", "p5", "p8"]},
    }

    with quiet():
        found = study_of(view, settled(view)).trials[0].distributions

    assert found["warmdown_iters"] == IntDistribution(2000, 4000)
    assert found["ema_decay"] == FloatDistribution(0.99, 0.999, log=True)
    assert found["clip"] == CategoricalDistribution(("none", "p5", "p8"))
    assert found["prune.ratio"] == CategoricalDistribution((0.0, 0.05))  # as it was tried


def test_texts_are_escaped(tmp_path: Path) -> None:
    view = written(Sweep(tmp_path, space={CLIP: ["none", HOSTILE]}))

    with quiet():
        trials = study_of(view, settled(view), HOSTILE).trials

    assert {trial.params["clip"] for trial in trials} == {"none", "&lt;/script&gt;&lt;b&gt;"}


def test_the_plane_has_megabytes_and_bpb(tmp_path: Path) -> None:
    view = written(Sweep(tmp_path))
    first = settled(view)[0]["result"]

    with quiet():
        values = plane_study(view, settled(view)).trials[0].values

    assert values == [first["artifact_bytes"] / 1e6, first["score"]["val_bpb"]]


def test_importances_add_up_and_put_what_decides_first(busy: SweepView) -> None:
    shares = importances(busy)

    assert shares is not None
    assert set(shares) == {WARMDOWN, EMA, CLIP, PRUNE, LEVEL}
    assert next(iter(shares)) == WARMDOWN
    assert sum(shares.values()) == pytest.approx(1.0)


def test_few_finals_have_no_importances(tmp_path: Path) -> None:
    view = written(Sweep(tmp_path, space={WARMDOWN: [2500, 3500], CLIP: ["none", "p5"]}))

    assert importances(view) is None


def test_importances_ask_only_what_counts(busy: SweepView) -> None:
    view, num_finals = copy.deepcopy(busy), len(busy.finals)
    for event in view.finals.values():
        if event["state"] != "failed" and event["point"][CLIP] == "p8":
            event["state"] = "infeasible"  # over the cap, with the lowest bpb of all
            event["result"]["score"]["val_bpb"] -= 0.5
    without = copy.deepcopy(view)
    without.finals = {k: e for k, e in view.finals.items() if e["state"] == "succeeded"}

    shares = importances(view)

    assert 10 <= len(without.finals) < num_finals
    assert shares == importances(without)
    for event in view.finals.values():
        event["state"] = "illegal"
    assert importances(view) is None


def test_finals_that_are_all_alike_make_no_knob_more_important(tmp_path: Path) -> None:
    view = written(Sweep(tmp_path, mean_bytes=15_000_000))
    for event in view.finals.values():
        event["result"]["score"]["val_bpb"] = 1.5

    shares = importances(view)

    assert shares is not None
    assert len(set(shares.values())) == 1


def test_one_thread_at_a_time_holds_optuna() -> None:
    before, order = warnings.filters[:], []

    def hold(name: str) -> None:
        with quiet():
            order.append(name)
            threading.Event().wait(0.01)
            order.append(name)

    threads = [threading.Thread(target=hold, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert order[::2] == order[1::2]
    assert warnings.filters == before
