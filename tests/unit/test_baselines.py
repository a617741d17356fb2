"""Baseline files: what ships, what a user may write, what is refused."""

from math import log

import pytest

from service.baselines import Baseline, BaselineResult, read_baseline, shipped
from trainer.codec import dump, to_yaml
from trainer.errors import UsageError

TEXT = {"name": "mine", "source": "a log", "tokens": 1_000, "bytes": 2_500}


def write(folder, **fields):
    path = folder / "mine.yaml"
    path.write_text(to_yaml({**TEXT, **fields}))
    return str(path)


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_baseline_says_where_it_comes_from(name):
    baseline = read_baseline(name)

    assert baseline.name == name
    assert "PR #" in baseline.source
    assert baseline.results or baseline.remarks


def test_published_means_are_those_of_the_published_seeds():
    means = {name: round(read_baseline(name).sample().mean, 4) for name in shipped()}

    assert means["pr414"] == 1.1233
    assert (means["pr1855"], means["pr1868"], means["pr374"]) == (1.0611, 1.0614, 1.1246)


def test_a_baseline_survives_being_written_and_read(tmp_path):
    baseline = Baseline(
        **TEXT, results=(BaselineResult(seed=1, value=1.2),), registered=(1,), remarks=("odd",)
    )
    path = tmp_path / "b.yaml"
    path.write_text(to_yaml(dump(baseline)))

    assert read_baseline(str(path)) == baseline


def test_values_in_nats_become_bits_per_byte_by_the_files_own_totals(tmp_path):
    path = write(tmp_path, unit="nats", results=[{"seed": 1, "value": 2.0}])

    assert read_baseline(path).sample().values == pytest.approx((2.0 / log(2) * 1_000 / 2_500,))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "give results, or the mean"),
        ({"mean": 1.1, "results": [{"seed": 1, "value": 1.0}]}, "give results, or the mean"),
        ({"mean": 1.1, "within": 1.5}, "within=1.5 must be a fraction"),
        ({"results": [{"seed": 1, "value": -1.0}]}, "value=-1.0"),
        ({"mean": 1.1, "sauce": "x"}, "sauce: unknown key; did you mean source?"),
    ],
)
def test_a_wrong_file_is_refused_by_its_path_and_field(tmp_path, fields, said):
    path = write(tmp_path, **fields)

    with pytest.raises(UsageError, match=said) as caught:
        read_baseline(path)

    assert str(caught.value).startswith(path)


def test_an_unknown_name_is_answered_with_what_ships():
    with pytest.raises(UsageError, match="no baseline 'pr141'; did you mean pr414"):
        read_baseline("pr141")
