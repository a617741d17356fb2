"""The tape: what it seals and lends, and how a killed evaluation goes on from its journal."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny
from trainer.data.bytecount import ByteTable
from trainer.errors import DataError, TrainingError, UsageError
from trainer.evaluate.journal import Journal, identity
from trainer.evaluate.sliding import score_windows, slide
from trainer.evaluate.tape import Tape
from trainer.evaluate.windows import Windows, plan_windows
from trainer.model.build import build
from trainer.runtime.distributed import Ranks
from trainer.specs.evaluate import Documents, EvaluateSpec

CPU = torch.device("cpu")
SPECS = {
    "flat": EvaluateSpec(window=16, stride=4, batch_windows=2),
    "documents": EvaluateSpec(window=16, stride=4, batch_windows=2, documents=Documents()),
    "again": EvaluateSpec(window=16, stride=4, batch_windows=2, variant="A"),
}
NAME = identity("this score")
CHILD = """\
import os, signal, sys
from pathlib import Path
from tests.unit.test_tape import NAME, SPECS, model_of, text, tape_of
from trainer.evaluate.journal import Journal
from trainer.evaluate.sliding import slide
from trainer.evaluate.tape import Tape
from trainer.runtime.distributed import Ranks

class Killer:
    done = 0
    def resumed(self, predictions): self.done += predictions
    def advance(self, predictions):
        self.done += predictions
        if self.done > int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)

spec = SPECS[sys.argv[1]]
tape = tape_of(spec, Journal(Path(sys.argv[2]), NAME, every_s=0.0))
tape.progress = Killer()
slide(model_of(), tape, spec, Ranks())
"""


@dataclass(frozen=True)
class OneOfTwo(Ranks):
    """A rank whose partner is not there: nothing is added up, and nothing fails elsewhere."""

    world_size: int = 2

    def sum(self, values):
        return values

    def max(self, value):
        return value


class Count:
    """Hears how far a tape is."""

    def __init__(self):
        self.before, self.now = 0, 0

    def resumed(self, predictions):
        self.before += predictions

    def advance(self, predictions):
        self.now += predictions


def model_of():
    return build(tiny.full_model(), seed=0).eval()


def text():
    return np.random.default_rng(0).integers(1, 8, size=141).astype(np.uint16)


def tape_of(spec, journal=None):
    return Tape(text(), again=spec.variant == "A", journal=journal)


def scored(spec, journal=None, ranks=Ranks()):  # noqa: B008 (a value, never changed)
    tape = tape_of(spec, journal)
    tape.progress = Count()
    slide(model_of(), tape, spec, ranks)
    return tape


def windows(*rows):
    return Windows(*np.array(rows, dtype=np.int64).T)


def flat(tokens, targets, width):
    return torch.ones(targets.shape) * width


def killed_at(name, folder, predictions):
    words = [sys.executable, "-c", CHILD, name, str(folder), str(predictions)]
    done = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr


def test_a_batch_is_as_wide_as_its_longest_window_and_told_the_whole_width():
    seen = []

    def forward(tokens, targets, width):
        seen.append((tokens.shape, targets.shape, width))
        return torch.zeros(targets.shape)

    Tape(text()).score(forward, windows((0, 9, 9), (20, 32, 3)), CPU, 16)

    assert seen == [((2, 12), (2, 12), 16)]


@pytest.mark.parametrize("rows", [[(0, 16, 4), (4, 17, 4)], [(0, 16, 4), (0, 16, 4)]])
def test_a_prediction_is_not_scored_twice_in_one_batch_either(rows):
    with pytest.raises(TrainingError, match="scored before; a score is final"):
        Tape(text()).score(flat, windows(*rows), CPU, 16)


def test_a_sealed_prediction_is_not_scored_again():
    tape = Tape(text())
    tape.score(flat, windows((0, 16, 16)), CPU, 16)

    with pytest.raises(TrainingError, match="prediction 12: scored before"):
        tape.score(flat, windows((4, 20, 8)), CPU, 16)


def test_only_scored_tokens_are_lent():
    tape = Tape(text())
    tape.score(flat, windows((0, 16, 16)), CPU, 16)

    lent = tape.lend(4, 16)

    assert lent.tolist() == text()[4:17].tolist()
    with pytest.raises(TrainingError, match=r"predictions 4\.\.16: 1 are not scored yet"):
        tape.lend(4, 17)


def test_events_tell_what_happened_in_order():
    tape = Tape(text())
    tape.score(flat, windows((0, 16, 16)), CPU, 16)
    tape.lend(0, 8)
    tape.note_update()
    tape.score(flat, windows((4, 20, 4)), CPU, 16)
    tape.illegal_tokens()

    assert [(event.kind, event.predictions) for event in tape.events] == [
        ("score", 16), ("lend", 8), ("update", 0), ("score", 4), ("peek", 140)
    ]  # fmt: skip
    digests = [event.digest for event in tape.events]
    assert digests[1] == digests[2] == digests[3] != digests[0]
    assert tape.order[:20].tolist() == [0] * 16 + [3] * 4


def test_progress_hears_every_prediction():
    assert scored(SPECS["documents"]).progress.now == 140


def test_totals_do_not_depend_on_how_many_bytes_are_counted_at_a_time(monkeypatch):
    table = ByteTable(np.arange(64), np.arange(64) % 2 == 0, np.arange(64) == 3)
    tape = scored(SPECS["flat"])
    whole = tape.totals(table)

    monkeypatch.setattr("trainer.evaluate.tape._COUNTED", 7)

    assert tape.totals(table) == whole
    assert whole.bytes == table.count(text()[:-1], text()[1:]).sum()


@pytest.mark.parametrize(("name", "kills"), [("documents", (60, 100)), ("again", (90,))])
def test_a_killed_evaluation_goes_on_and_ends_as_if_it_had_not_been(name, kills, tmp_path):
    whole, num_parts = scored(SPECS[name]), [0]

    for predictions in kills:
        killed_at(name, tmp_path, predictions)
        num_parts.append(len(list(tmp_path.glob("*.npz"))))
    tape = scored(SPECS[name], Journal(tmp_path, NAME, every_s=0.0))

    assert num_parts == sorted(set(num_parts))
    assert tape.losses.tobytes() == whole.losses.tobytes()
    assert (tape.times == whole.times).all()
    assert (tape.order == whole.order).all()
    assert (tape.events, tape.digest()) == (whole.events, whole.digest())
    assert 60 < tape.progress.before < 140
    assert tape.progress.now == (tape.times.sum() - tape.progress.before)


def test_two_ranks_parts_are_resumed_by_one(tmp_path):
    spec, whole = SPECS["documents"], scored(SPECS["documents"])
    for rank in range(2):
        scored(spec, Journal(tmp_path, NAME, rank, every_s=0.0), OneOfTwo(rank=rank))

    tape = scored(spec, Journal(tmp_path, NAME))

    assert tape.progress.now == 0
    assert tape.losses.tobytes() == whole.losses.tobytes()


def test_of_two_ranks_only_the_first_takes_the_scores_over(tmp_path):
    spec = SPECS["flat"]
    scored(spec, Journal(tmp_path, NAME, every_s=0.0))

    second = scored(spec, Journal(tmp_path, NAME, rank=1), OneOfTwo(rank=1))

    assert second.progress.now == second.times.sum() == 0


def test_a_short_evaluation_writes_nothing(tmp_path):
    scored(SPECS["flat"], Journal(tmp_path / "journal", NAME))

    assert not (tmp_path / "journal").exists()


def test_the_journal_of_another_score_is_refused(tmp_path):
    scored(SPECS["flat"], Journal(tmp_path, identity("another"), every_s=0.0))

    with pytest.raises(DataError, match=r"000000-0\.npz: belongs to another score .*; remove"):
        scored(SPECS["flat"], Journal(tmp_path, NAME))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", None])
def test_an_altered_part_is_refused_by_name(tmp_path, content):
    scored(SPECS["flat"], Journal(tmp_path, NAME, every_s=0.0))
    path = sorted(tmp_path.glob("*.npz"))[1]
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + b"\xff\x00\xff" + whole[middle + 3 :] if content is None
                     else content)  # fmt: skip

    with pytest.raises(DataError, match=r"000001-0\.npz: altered since it was written; remove"):
        scored(SPECS["flat"], Journal(tmp_path, NAME))


def test_what_a_killed_write_leaves_is_no_part(tmp_path):
    (tmp_path / ".000000-0.npz.77.tmp").write_bytes(b"half")

    assert scored(SPECS["flat"], Journal(tmp_path, NAME)).progress.before == 0


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(UsageError, match=r"file: File exists; make room there, or take"):
        scored(SPECS["flat"], Journal(tmp_path / "file", NAME, every_s=0.0))


def test_the_state_of_the_last_part_comes_back_and_older_ones_are_gone(tmp_path):
    spec, model = SPECS["flat"], model_of()
    tape = tape_of(spec, Journal(tmp_path, NAME, every_s=0.0))
    plan = plan_windows(len(tape), spec)
    for number in range(3):
        score_windows(model, tape, plan.take(slice(9 * number, 9 * number + 9)), spec, Ranks())
        tape.lend(0, 4)
        tape.save(lambda number=number: {"chunk": number, "w": torch.full((2,), float(number))})
    # Killed between a state and its part: the part never came, so the state says nothing.
    (tmp_path / "000003-0.state").mkdir()

    journal = Journal(tmp_path, NAME)
    again = tape_of(spec, journal)
    again.resume(Ranks())

    assert journal.state["chunk"] == 2
    assert journal.state["w"].tolist() == [2.0, 2.0]
    assert again.events == tape.events
    assert (again.order == tape.order).all()
    assert sorted(path.name[:6] for path in tmp_path.glob("*.state")) == ["000002", "000003"]


def test_the_first_rank_keeps_what_it_gathered(tmp_path):
    class Partner(OneOfTwo):
        """Holds the scores of predictions 16 to 19."""

        def sum(self, values):
            values[16:20] += 1 if values.dtype == torch.int32 else 0.5
            return values

    tape = Tape(text(), journal=Journal(tmp_path, NAME, every_s=0.0))
    tape.score(flat, windows((0, 16, 16)), CPU, 16)
    tape.gather(Partner(), 0, 20)
    tape.save()

    again = Tape(text(), journal=Journal(tmp_path, NAME))
    again.resume(Ranks())

    assert again.losses[:21].tolist() == [16.0] * 16 + [0.5] * 4 + [0.0]
    assert (again.events, again.digest()) == (tape.events, tape.digest())
    assert (again.order == tape.order).all()


def test_another_rank_writes_nothing_that_it_gave_to_the_first(tmp_path):
    tape = Tape(text(), journal=Journal(tmp_path, NAME, rank=1, every_s=0.0))
    tape.score(flat, windows((0, 16, 16)), CPU, 16)

    tape.gather(OneOfTwo(rank=1), 0, 16)
    tape.note_update()
    tape.save()

    assert list(tmp_path.iterdir()) == []


def test_an_identity_tells_all_its_parts_apart():
    state = {"a": torch.ones(2), "b": torch.zeros(2, dtype=torch.bfloat16)}
    parts = [
        ({"x": 1}, state),
        ({"x": 2}, state),
        ({"x": 1}, state | {"a": torch.tensor([1.0, 2.0])}),
        ({"x": 1}, state | {"b": torch.zeros(2)}),
        ({"x": 1}, {"b": state["a"], "a": state["b"]}),
        ({"x": 1}, np.ones(2, dtype=np.float32)),
        ({"x": 1}, np.ones(2)),
        ({"x": 1},),
    ]

    assert len({identity(*part) for part in parts}) == len(parts)
    assert identity({"x": 1}, state) == identity({"x": 1}, dict(reversed(state.items())))
