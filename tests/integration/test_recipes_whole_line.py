"""The scale-down of every system walks the whole line: trained, finished, packed, scored."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer.__main__ import main
from trainer.data.prepare import prepare_embedded
from tune_spaces.catalogue import find

SYSTEMS = ("baseline", "pr348", "pr361", "pr414", "pr610", "pr951")
ENTRIES = {
    "baseline": "raw",
    "pr348": "swa",
    "pr361": "swa",
    "pr414": "ema-0.9",
    "pr610": "ema-0.9",
    "pr951": "ema-0.9",
}
# Windows side by side, because a score costs more here than the training.
SHORT = ("evaluate.stride=128",)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded text, prepared once."""
    return prepare_embedded(tmp_path_factory.mktemp("data") / "embedded").folder


@pytest.fixture(autouse=True)
def quiet_loggers() -> Iterator[None]:
    logger = logging.getLogger("trainer")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def walk(recipe: str, data: Path, out: Path, *values: str) -> int:
    words = [word for value in (*SHORT, *values) for word in ("-S", value)]
    return main([str(find("recipes", recipe, "test")), "--data", str(data), "-o", str(out), *words])


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_scale_down_learns_and_scores_from_its_own_artifact(
    system: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = walk(f"{system}-tiny", data, tmp_path)

    said = capsys.readouterr()
    assert status == 0, said.err
    result: dict[str, Any] = json.loads(said.out)
    training = json.loads((tmp_path / "training/result.json").read_text(encoding="utf-8"))
    weights = tmp_path / "final/artifact/weights.fw"
    assert result["entry"] == ENTRIES[system]
    assert {rule["id"] for rule in result["audit"] if rule["verdict"] != "pass"} == {"clocks"}
    assert weights.stat().st_size == result["weights_bytes"] < 400_000
    assert 0 < result["score"]["val_bpb"] < training["untrained_val_bpb"] - 0.1
