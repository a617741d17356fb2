"""The planner: what an evaluation would take, and the best that a budget allows."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from trainer.errors import InfeasibleError
from trainer.evaluate.timing import Speed, estimate_s, handicap, measure, options, pick
from trainer.evaluate.windows import plan_windows
from trainer.model.build import build
from trainer.runtime.distributed import Ranks
from trainer.specs.evaluate import Documents, EvaluateSpec
from trainer.specs.ttt import LoraTtt, OracleTtt, Phases, SgdTtt

EVEN = Speed(whole_s=1.0, end_s=1.0)
FLAT = EvaluateSpec(window=2048, stride=64)
SGD = replace(FLAT, ttt=SgdTtt())
APART = replace(FLAT, documents=Documents())
LORA = replace(APART, ttt=LoraTtt())
N = 2_000_000
STARTS = np.arange(0, N, 1_000)


def seconds(spec, speed=EVEN, world_size=1):
    return estimate_s(spec, N, None if spec.documents is None else STARTS, speed, world_size)


def test_a_stream_takes_a_forward_a_window():
    assert seconds(FLAT) == pytest.approx(len(plan_windows(N, FLAT)), rel=1e-3)


def test_a_forward_that_scores_little_is_charged_little():
    speed = Speed(whole_s=1.0, end_s=0.5)

    assert seconds(FLAT, speed) == pytest.approx(seconds(FLAT) * (0.5 + 0.5 / 32), rel=1e-3)
    assert seconds(replace(FLAT, stride=2048), speed) == pytest.approx(N / 2048, rel=1e-3)


def test_documents_that_fit_are_read_once_and_with_lora_chunk_by_chunk():
    assert seconds(APART) == pytest.approx(N / 2048, rel=1e-3)
    chunks = sum(min(64 * (i + 1), 1_000) for i in range(16)) / 2048 * len(STARTS)
    assert seconds(LORA) == pytest.approx(3 * chunks, rel=1e-3)


def test_phases_train_on_the_documents_before_them():
    phases = Phases(documents=1_000, count=2, epochs=3)

    more = seconds(replace(LORA, ttt=LoraTtt(phases=phases))) - seconds(LORA)

    # Half of the text is trained on, first a half of that and then all.
    assert more == pytest.approx(3 * 3 * (0.5 + 1.0) * N / 2 / 2048, rel=1e-3)


def test_sgd_trains_three_forwards_a_sequence_on_all_chunks_but_the_last():
    more = seconds(SGD) - seconds(FLAT)

    chunks = -(-N // 32_768) - 1
    assert more == pytest.approx(chunks * 16 * 3 * 3)


def test_a_gang_shares_windows_alike_and_sequences_whole():
    assert seconds(FLAT, world_size=8) == pytest.approx(seconds(FLAT) / 8)
    short = replace(SGD, ttt=SgdTtt(chunk_tokens=3 * 2048))
    chunks = -(-N // (3 * 2048)) - 1
    assert seconds(short, world_size=2) == pytest.approx(seconds(FLAT) / 2 + chunks * 2 * 9)


def test_an_oracle_reads_the_text_once_an_epoch():
    more = seconds(replace(FLAT, ttt=OracleTtt(epochs=30))) - seconds(FLAT)

    assert more == pytest.approx(30 * 3 * N / 2048)


def test_handicaps_are_those_that_were_measured():
    by_stride = [handicap(replace(FLAT, stride=stride)) for stride in (32, 64, 2048)]

    assert by_stride[1] - by_stride[0] == pytest.approx(1e-4, abs=5e-5)  # PR #609
    assert by_stride[2] - by_stride[1] == pytest.approx(0.024, abs=5e-4)
    assert handicap(FLAT) - handicap(SGD) == pytest.approx(0.0025, abs=1e-4)  # PR #549


def test_strides_come_down_to_a_thirty_second_of_the_window():
    found = options(replace(FLAT, stride=2048), N, None, EVEN, 1)

    assert [option.spec.stride for option in found] == [64, 128, 256, 512, 1024, 2048]
    assert found[0].choices() == {"stride": 64}


def test_sgd_chooses_epochs_and_chunk_too_and_the_chunk_given_comes_first():
    found = options(SGD, N, None, EVEN, 1)

    assert found[0].choices() == {"stride": 64, "ttt.epochs": 10, "ttt.chunk_tokens": 32_768}
    assert {option.choices()["ttt.epochs"] for option in found} == {1, 2, 3, 5, 10}
    assert all(option.spec.ttt.lr == SGD.ttt.lr for option in found)


def test_a_gang_wider_than_a_chunk_takes_a_longer_chunk_for_a_budget():
    found = options(replace(SGD, ttt=SgdTtt(chunk_tokens=4_096)), N, None, EVEN, 8)
    longest = min(option.seconds for option in found)

    assert pick(found, longest).choices()["ttt.chunk_tokens"] == 16_384


@given(st.floats(1e2, 1e6), st.floats(1.0, 10.0), st.sampled_from([FLAT, SGD, APART, LORA]))
def test_a_larger_budget_never_gives_more_away(budget, factor, spec):
    found = options(spec, 200_000, STARTS[:200], EVEN, 1)
    quickest = min(option.seconds for option in found)

    small, large = (pick(found, max(quickest, part)) for part in (budget, factor * budget))

    assert small.seconds <= max(quickest, budget)
    assert large.handicap <= small.handicap


def test_a_budget_that_nothing_fits_says_what_would():
    with pytest.raises(
        InfeasibleError, match=r"a budget of 5 s: .*\(stride=2048\) takes about 977"
    ):
        pick(options(FLAT, N, None, EVEN, 1), 5.0)


def test_a_measured_end_is_no_dearer_than_the_whole(monkeypatch):
    monkeypatch.setattr("trainer.evaluate.timing._TIMED_S", 0.05)
    model = build(tiny.full_model(), seed=0).train()

    speed = measure(model, EvaluateSpec(window=256, stride=64), Ranks())

    assert 0 < speed.end_s <= speed.whole_s < 5
    assert model.training
