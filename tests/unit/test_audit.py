import math

import numpy as np
import pytest

from trainer.evaluate import audit
from trainer.evaluate.bpb import bits_per_byte, nats_per_token
from trainer.evaluate.windows import Windows, plan_windows
from trainer.results import Totals
from trainer.specs.evaluate import EvaluateSpec


def columns(*windows):
    return Windows(*(np.array(column, dtype=np.int64) for column in zip(*windows, strict=True)))


def test_bits_per_byte_is_nats_over_bytes_in_bits():
    totals = Totals(nats=700.0 * math.log(2), tokens=200, bytes=500)

    assert bits_per_byte(totals) == pytest.approx(1.4)
    assert nats_per_token(totals) == pytest.approx(3.5 * math.log(2))


def test_a_full_plan_passes_coverage():
    rule = audit.coverage(plan_windows(100, EvaluateSpec(window=32, stride=8)), 100)

    assert (rule.id, rule.verdict) == ("coverage", "pass")


@pytest.mark.parametrize(
    ("plan", "detail"),
    [
        (columns((0, 10, 10), (5, 18, 8)), "2 not scored, 0 scored again"),
        (columns((0, 10, 10), (5, 20, 12)), "0 not scored, 2 scored again"),
    ],
)
def test_a_skipped_or_repeated_prediction_fails_coverage(plan, detail):
    rule = audit.coverage(plan, 20)

    assert rule.verdict == "fail"
    assert detail in rule.detail


@pytest.mark.parametrize(
    ("expected_bytes", "expected_tokens", "verdict"),
    [(500, 200, "pass"), (501, 200, "fail"), (500, 199, "fail")],
)
def test_byte_accounting_allows_no_difference(expected_bytes, expected_tokens, verdict):
    totals = Totals(nats=1.0, tokens=200, bytes=500)

    rule = audit.byte_accounting(totals, expected_bytes, expected_tokens)

    assert rule.verdict == verdict


@pytest.mark.parametrize(
    ("fresh", "verdict"),
    [(1.5, "pass"), (1.5 + 1e-7, "pass"), (1.501, "fail"), (1.499, "fail"), (math.nan, "fail")],
)
def test_parity_fails_beyond_its_tolerance(fresh, verdict):
    assert audit.parity(1.5, fresh, 1e-6).verdict == verdict
