"""Finding a sweep by what a user remembers of it."""

import os
from pathlib import Path

import pytest

from service.catalogue_view import find_sweep
from service.ledger import Ledger
from service.paths import Paths
from trainer.errors import UsageError


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = Paths(tmp_path)
    for age, sweep in enumerate(["micro-aaaa", "micro-bbbb", "micro-large-cccc"]):
        ledger = paths.sweep(sweep).ledger
        with Ledger(ledger) as writer:
            writer.append("sweep_started", sweep_id=sweep)
        os.utime(ledger, (age, age))
    return paths


@pytest.mark.parametrize(
    ("ref", "found"),
    [
        (None, "micro-large-cccc"),
        ("micro-aaaa", "micro-aaaa"),
        ("micro-b", "micro-bbbb"),
        ("micro", "micro-bbbb"),
        ("micro-large", "micro-large-cccc"),
    ],
)
def test_a_sweep_is_found_by_id_start_or_name_the_newest_first(paths, ref, found):
    assert find_sweep(paths, ref).root.name == found


def test_a_start_that_fits_several_sweeps_lists_them(paths):
    with pytest.raises(UsageError, match="fits 3 sweeps: micro-aaaa, micro-bbbb"):
        find_sweep(paths, "mic")


def test_an_unknown_sweep_is_refused_with_a_suggestion(paths):
    with pytest.raises(UsageError, match="did you mean micro-aaaa"):
        find_sweep(paths, "mikro-aaaa")
