"""What counts as the same: equal bytes on CPUs, within the noise of seeds on GPUs."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from service.facts import Gpu
from service.replay import Outcome, Prepared, Spread, compare, is_exact, prepare
from service.sheet import Branch, Noise, Sheet, read_sheet
from tests.scored import Scored, on_both, scored_home
from trainer.codec import parse
from trainer.errors import UsageError
from trainer.results import FinalResult, TrainResult
from trainer.runtime.files import read_json


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Scored:
    return scored_home(tmp_path_factory.mktemp("scored"))


@pytest.fixture
def sheet(home: Scored) -> Sheet:
    return read_sheet(home.sheet(home.finals()[0]))


@pytest.fixture
def on_gpus(sheet: Sheet) -> Sheet:
    """A sheet of a gang of eight GPUs, to be run on none."""
    gpus = tuple(Gpu(name="NVIDIA H200", uuid=f"GPU-{rank}") for rank in range(8))
    return replace(on_both(sheet, device="cuda", gpus=gpus), device="cuda", world_size=8)


def results(home: Scored, sheet: Sheet) -> Outcome:
    """What the sheet's own stages returned."""
    final = home.paths.store / "finals" / sheet.final / "result.json"
    training = home.paths.store / "trainings" / sheet.training / "result.json"
    return Outcome(
        parse(TrainResult, read_json(training), "training"),
        parse(FinalResult, read_json(final), "final"),
    )


def prepared_for(home: Scored, sheet: Sheet, noise: Spread | None = None) -> Prepared:
    ready = prepare(home.paths, read_sheet(home.sheet(sheet.final)), None)
    return replace(ready, sheet=sheet, noise=noise or Spread())


def scored_as(outcome: Outcome, off_bpb: float) -> Outcome:
    assert outcome.final is not None
    score = outcome.final.score
    moved = replace(score, val_bpb=score.val_bpb + off_bpb)
    return replace(outcome, final=replace(outcome.final, score=moved, weights_sha256="1" * 64))


def test_on_a_cpu_one_other_byte_is_not_the_same(home: Scored, sheet: Sheet) -> None:
    same = compare(prepared_for(home, sheet), results(home, sheet))
    other = compare(prepared_for(home, sheet), scored_as(results(home, sheet), 0.0))

    assert (same["same"], same["criterion"]) == (True, "the same bytes")
    assert not other["same"]
    assert f"weights_sha256 {sheet.result.weights_sha256} → {'1' * 64}" in other["verdict"]


def test_what_is_not_the_same_says_which_fact_differs(home: Scored, sheet: Sheet) -> None:
    other = on_both(sheet, libzstd="1.5.5")
    prepared = prepare(home.paths, other, None, (), ["libzstd"])

    document = compare(prepared, scored_as(results(home, sheet), 0.0))

    assert "what differs here: libzstd: 1.5.5 → " in document["verdict"]


@pytest.mark.parametrize(("off", "same"), [(0.9, True), (1.1, False)])
def test_on_gpus_the_bpb_must_lie_within_the_noise_of_seeds(
    home: Scored, on_gpus: Sheet, off: float, same: bool
) -> None:
    outcome = scored_as(results(home, on_gpus), off * Spread().limit_bpb)

    document = compare(prepared_for(home, on_gpus), outcome)

    assert document["same"] is same
    assert document["noise"]["source"] == "techniques 1.8"


def test_the_noise_that_was_measured_sets_the_limit(home: Scored, on_gpus: Sheet) -> None:
    outcome = scored_as(results(home, on_gpus), 2 * Spread().limit_bpb)
    measured = Spread(0.002, 2, "the sweep's seeds")

    document = compare(prepared_for(home, on_gpus, measured), outcome)

    assert document["same"]
    assert document["noise"] == {"sd_bpb": 0.002, "df": 2, "source": "the sweep's seeds"}


@pytest.mark.parametrize("df", [1, 2, 7])
def test_95_of_100_honest_replays_lie_within_a_measured_limit(df: int) -> None:
    scores = np.random.default_rng(1).normal(size=(20_000, df + 3))
    measured = scores[:, : df + 1].std(axis=1, ddof=1)
    apart = abs(scores[:, -1] - scores[:, -2])

    within = apart <= measured * Spread(1.0, df, "seeds").limit_bpb

    assert within.mean() == pytest.approx(0.95, abs=0.01)


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="is about a machine without")
def test_a_machine_without_the_gpus_is_refused(home: Scored, on_gpus: Sheet) -> None:
    with pytest.raises(UsageError) as caught:
        prepare(home.paths, on_gpus, None)

    told = str(caught.value)
    assert "device: cuda → cpu" in told
    assert "world_size: 8 GPUs → 0 GPUs" in told


LACKING = ["device", "final", "world_size"]


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="is about a machine without")
def test_noise_that_only_the_sheet_tells_of_is_called_so(home: Scored, on_gpus: Sheet) -> None:
    told = replace(on_gpus, noise=Noise(sd_bpb=0.001, df=3))

    noise = prepare(home.paths, told, None, (), LACKING).noise

    assert noise == Spread(0.001, 3, "the sheet")


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="is about a machine without")
def test_noise_beyond_what_seeds_do_is_not_taken_from_a_sheet(home: Scored, on_gpus: Sheet) -> None:
    told = replace(on_gpus, noise=Noise(sd_bpb=50.0, df=3))

    with pytest.raises(UsageError, match=r"noise: sd_bpb 50 in the sheet → .*--allow noise$"):
        prepare(home.paths, told, None, (), LACKING)


def test_a_quarantined_bank_is_not_the_same(home: Scored, sheet: Sheet) -> None:
    outcome = replace(results(home, sheet), final=None, quarantined="bank quarantined: 1e-3 apart")

    document = compare(prepared_for(home, sheet), outcome)

    assert (document["same"], document["verdict"]) == (False, "bank quarantined: 1e-3 apart")


def with_train(sheet: Sheet, **changes: Any) -> Sheet:
    task = replace(sheet.train_task, train=replace(sheet.train_task.train, **changes))
    return replace(sheet, train_task=task)


def test_bytes_are_asked_for_only_where_they_can_be_equal(sheet: Sheet, on_gpus: Sheet) -> None:
    branch = Branch(state="s0", step=4)
    unbound = with_train(sheet, max_clock_s=600.0)
    ended = replace(unbound, result=replace(sheet.result, steps=5))

    assert is_exact(sheet)
    assert is_exact(replace(sheet, branch=branch))
    assert is_exact(unbound)
    assert not is_exact(ended)  # by its clock
    assert not is_exact(with_train(replace(sheet, branch=branch), compile=True))
    assert not is_exact(on_gpus)
