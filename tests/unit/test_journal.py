import json

import pytest

from trainer.errors import DataError
from trainer.train.journal import Journal


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def points(path):
    """Return (step, values) of every line."""
    read = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(p["step"], {k: v for k, v in p.items() if k not in ("step", "at")}) for p in read]


def test_observations_are_lines_in_order(path):
    journal = Journal(path, writes=True)

    journal.write(0, {"val/bpb": 8.0})
    journal.write(2, {"train/loss": 5.0, "train/lr_scale": 1.0})

    assert points(path) == [(0, {"val/bpb": 8.0}), (2, {"train/loss": 5.0, "train/lr_scale": 1.0})]


def test_two_series_may_share_a_step_but_no_series_repeats_one(path):
    journal = Journal(path, writes=True)

    journal.write(2, {"loss": 5.0})
    journal.write(2, {"loss": 6.0, "bpb": 1.0})

    assert points(path) == [(2, {"loss": 5.0}), (2, {"bpb": 1.0})]


def test_steps_that_a_resume_repeats_are_not_written_twice(path):
    before = Journal(path, writes=True)
    before.write(2, {"loss": 5.0})
    before.write(4, {"loss": 4.0})

    resumed = Journal(path, writes=True)
    for step, loss in ((2, 9.0), (4, 9.0), (6, 3.0)):
        resumed.write(step, {"loss": loss})

    assert points(path) == [(2, {"loss": 5.0}), (4, {"loss": 4.0}), (6, {"loss": 3.0})]


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4, "loss": 4.0}'])
def test_a_torn_last_line_is_cut_and_written_again(path, torn):
    Journal(path, writes=True).write(2, {"loss": 5.0})
    with path.open("a", encoding="utf-8") as file:
        file.write(torn)

    Journal(path, writes=True).write(4, {"loss": 4.5})

    assert points(path) == [(2, {"loss": 5.0}), (4, {"loss": 4.5})]


def test_a_line_that_no_journal_wrote_is_refused_by_file(path):
    path.write_text('{"step": 2, "loss": 5.0}\nnonsense\n', encoding="utf-8")

    with pytest.raises(DataError, match=r"metrics\.jsonl: b'nonsense\\n' is no observation"):
        Journal(path, writes=True)


def test_only_the_writing_rank_touches_the_file(path):
    Journal(path, writes=False).write(2, {"loss": 5.0})

    assert not path.exists()


def test_a_value_that_is_no_number_is_not_written(path):
    journal = Journal(path, writes=True)

    with pytest.raises(ValueError, match="JSON compliant"):
        journal.write(2, {"loss": float("nan")})


def test_a_trunks_journal_is_taken_over_with_its_times(path, tmp_path):
    trunk = tmp_path / "trunk.jsonl"
    trunk.write_text(
        '{"step": 2, "at": 7.5, "loss": 5.0}\n{"step": 4, "at": 8.5, "loss": 4.0, "bpb": 1.0}\n'
    )

    Journal(path, writes=True).take_over(trunk)

    assert path.read_text(encoding="utf-8") == trunk.read_text(encoding="utf-8")


def test_what_is_known_of_a_trunks_journal_is_not_taken_over_again(path, tmp_path):
    trunk = tmp_path / "trunk.jsonl"
    Journal(trunk, writes=True).write(4, {"loss": 4.0, "bpb": 1.0})
    journal = Journal(path, writes=True)
    journal.write(4, {"loss": 4.0})

    journal.take_over(trunk)
    journal.take_over(trunk)

    assert points(path) == [(4, {"loss": 4.0}), (4, {"bpb": 1.0})]


def test_a_trunk_without_its_journal_is_refused(path, tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: No such file or directory; remove .* again"):
        Journal(path, writes=True).take_over(tmp_path / "none.jsonl")


def test_the_lines_up_to_a_step_are_copied(path, tmp_path):
    journal = Journal(path, writes=True)
    for step in (2, 4, 6):
        journal.write(step, {"loss": 5.0 - step})

    journal.copy_until(4, tmp_path / "copy.jsonl")

    assert points(tmp_path / "copy.jsonl") == points(path)[:2]
