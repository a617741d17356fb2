"""What a score says of itself beyond its number."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests import tiny
from trainer.data.shards import Dataset
from trainer.evaluate.journal import Journal
from trainer.model.build import build
from trainer.runtime.distributed import Ranks
from trainer.scoring import score_text, val_text
from trainer.specs.ttt import SgdTtt

STEP_S = 1_000.0


class Killed(Exception):
    """What ends the first attempt."""


class SlowThenKilled:
    """Takes so many seconds, by a clock that it moves, at every advance, and ends at the fourth."""

    def __init__(self, clock: pytest.MonkeyPatch) -> None:
        self.num_advances, self.now = 0, time.monotonic
        clock.setattr(time, "monotonic", lambda: self.now() + STEP_S * self.num_advances)

    def resumed(self, predictions: int) -> None:
        assert predictions == 0

    def advance(self, predictions: int) -> None:
        self.num_advances += 1
        if self.num_advances == 4:
            raise Killed


def test_a_score_that_was_killed_is_timed_over_all_its_attempts(
    tiny_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, text = tiny.recipe(), val_text(tiny_dataset)
    text = replace(text, tokens=text.tokens[:400])
    spec = replace(recipe.evaluate, stride=recipe.evaluate.window, ttt=SgdTtt(chunk_tokens=64))
    first, second = (build(recipe.model, seed=0) for _ in range(2))
    journal = Journal(tmp_path / "journal", "me", every_s=0.0)
    slow = {"progress": SlowThenKilled(monkeypatch), "journal": journal}
    with pytest.raises(Killed):
        score_text(first, text, spec, Ranks(), **slow)

    again = Journal(tmp_path / "journal", "me")
    scored = score_text(second, text, spec, Ranks(), journal=again)

    assert scored.was_resumed
    assert 3 * STEP_S <= scored.score.eval_clock_s < 4 * STEP_S
