"""The clock ledger: what counts, what does not, and what a policy file may say."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.clocks import charge, load_policy, overrun
from trainer.errors import UsageError
from trainer.train.state import PHASES

SHIPPED = Path(__file__).resolve().parents[2] / "service" / "clocks.yaml"
TRAINING = {
    "train_clock_s": 604.1,
    "clock_s": {
        "setup": 40.0,
        "warmup": 60.0,
        "train": 604.1,
        "validate": 30.0,
        "checkpoint": 5.0,
        "bank": 2.0,
    },
}
FINAL = {
    "finalize_clock_s": 75.0,
    "calibration": "train",
    "calibration_clock_s": 8.3,
    "score": {"eval_clock_s": 450.0},
}

Write = Callable[[dict[str, Any]], str]


@pytest.fixture
def policy_file(tmp_path: Path) -> Write:
    """Write the shipped policy with some of its phases altered; None takes one out."""

    def write(changes: dict[str, Any]) -> str:
        data = yaml.safe_load(SHIPPED.read_text())
        phases = {**data["phases"], **changes}
        data["phases"] = {name: phase for name, phase in phases.items() if phase is not None}
        path = tmp_path / "clocks.yaml"
        path.write_text(yaml.safe_dump(data))
        return str(path)

    return write


def test_steps_and_calibration_on_training_text_are_charged_to_the_training_clock() -> None:
    charged = charge(load_policy(), TRAINING, FINAL)

    assert charged.parts["train"] == {"train": 604.1, "hessians": 8.3}
    assert charged.parts["eval"] == {"score": 450.0}
    assert charged.train_s == pytest.approx(612.4)
    assert charged.eval_s == 450.0


def test_calibration_on_text_of_the_models_own_is_charged_to_no_clock() -> None:
    charged = charge(load_policy(), TRAINING, FINAL | {"calibration": "generated"})

    assert charged.parts["train"] == {"train": 604.1}


def test_an_overrun_says_by_how_much_and_what_the_clock_is_made_of() -> None:
    charged = charge(load_policy(), TRAINING, FINAL)

    over = overrun(charged, {"train": 600, "eval": 600})

    assert over == "train_clock_s 612.4 > 600, over by 12.4 (train 604.1 + hessians 8.3)"


def test_a_clock_at_its_limit_is_no_overrun() -> None:
    charged = charge(load_policy(), TRAINING, FINAL)

    assert overrun(charged, {"eval": 450}) is None
    assert overrun(charged, {"eval": math.nextafter(450, 0)}) is not None
    assert overrun(charged, {}) is None


def test_a_policy_of_ones_own_moves_a_phase_to_another_clock(policy_file: Write) -> None:
    path = policy_file({"finalize": {"clock": "eval", "why": "a stricter reading"}})

    charged = charge(load_policy(path), TRAINING, FINAL)

    assert charged.parts["eval"] == {"finalize": 75.0, "score": 450.0}


def test_the_shipped_policy_has_every_phase_that_a_training_records() -> None:
    phases = yaml.safe_load(SHIPPED.read_text())["phases"]

    assert set(PHASES) <= set(phases)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"score": None}, "phases.score: missing"),
        ({"warmpu": {"clock": "none", "why": "x"}}, "phases.warmpu: unknown key"),
        ({"train": {"clock": "gpu", "why": "x"}}, "phases.train.clock: got"),
        ({"train": {"clock": "train"}}, "phases.train.why: missing"),
        ({"train": {"clock": "train", "why": " "}}, "phases.train: why is empty"),
    ],
)
def test_a_policy_that_is_wrong_names_file_and_field(
    policy_file: Write, changes: dict[str, Any], line: str
) -> None:
    path = policy_file(changes)

    with pytest.raises(UsageError) as refused:
        load_policy(path)

    assert str(refused.value).startswith(f"{path}: {line}")


def test_a_policy_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.yaml: No such file"):
        load_policy(str(tmp_path / "none.yaml"))
