"""What the exporter does not follow stays in the file, or stops the export."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from service.singlefile.cut import Cut
from service.singlefile.program import ExportError, parse_module
from tests import tiny
from trainer.specs.task import final_task, train_task

ROOT = "trainer.made_up"
HEAD = """\
import logging
from dataclasses import replace
from typing import Any

from service.singlefile.recipe import FINAL, TRAIN, WORLD_SIZE
from trainer.specs.model import ModelSpec
from trainer.specs.train import TrainSpec

"""
# Each ends with 1, and would end with 2 had the exporter decided by less than all of it.
RUNS = {
    "a subclass has another property": """
class Kind:
    @property
    def is_scaled(self) -> bool:
        return False

class ScaledKind(Kind):
    @property
    def is_scaled(self) -> bool:
        return True

def work(kind: Kind) -> int:
    return 1 if kind.is_scaled else 2

def main() -> int:
    return work(ScaledKind()) * work(Kind()) - 1
""",
    "an attribute is set from outside its class": """
class Late:
    def __init__(self) -> None:
        self.limit = TRAIN.model.mtp

def main() -> int:
    late = Late()
    late.limit = 3.0
    return 2 if late.limit is None else 1
""",
    "a default of a class is set by a method": """
class Seen:
    seen = None

    def note(self) -> None:
        self.seen = Seen()

    def said(self) -> int:
        return 1 if self.seen is None else 2

def main() -> int:
    return Seen().said()
""",
    "a base class sets another value than the subclass": """
class Base:
    def __init__(self) -> None:
        self.part = None

class Whole(Base):
    def fill(self) -> None:
        self.part = Whole()

def main() -> int:
    whole = Whole()
    return 1 if whole.part is None else 2
""",
    "a counter's only reader is cut": """
def main() -> int:
    done = 0
    done += 1
    if TRAIN.model.mtp is not None:
        return done + 1
    return 1
""",
    "all methods of a class are cut": """
class Tag:
    def unused(self) -> int:
        return 2

def main() -> int:
    return 1 if Tag() else 2
""",
    "a truth is set from outside its class": """
class Late:
    def __init__(self) -> None:
        self.is_on, self.limit = False, None

def main() -> int:
    late = Late()
    late.is_on = True
    return 1 if late.is_on else 2
""",
    "a subclass sets another truth": """
class Plain:
    def __init__(self) -> None:
        self.is_on = False

class Fast(Plain):
    def __init__(self) -> None:
        self.is_on = True

def work(plain: Plain) -> int:
    return 1 if plain.is_on else 2

def main() -> int:
    return work(Fast()) * work(Plain()) - 1
""",
    "several constants are named in one line": """
_ROWS, _COLUMNS = 3, 2

def main() -> int:
    return _ROWS - _COLUMNS
""",
    "an operator of torch's has registrations": """
import torch
from torch import Tensor

@torch.library.custom_op("fairway_made_up::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return 2 * x

@double.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)

def _learn(ctx: Any, grad: Tensor) -> Tensor:
    return 2 * grad

double.register_autograd(_learn)

@torch.library.custom_op("fairway_made_up::unread", mutates_args=())
def unread(x: Tensor) -> Tensor:
    return absent(x)

@unread.register_fake
def _(x: Tensor) -> Tensor:
    return absent(x)

def main() -> int:
    x = torch.ones(1, requires_grad=True)
    torch.compile(double, fullgraph=True, backend="eager")(x).sum().backward()
    return int(x.grad.item()) - 1
""",
    "a package that is not here is asked for in a function": """
def main() -> int:
    try:
        from flash_attn_interface import attend
    except ImportError:
        return 1
    return attend()
""",
    "a spec without an annotation is replaced": """
def longer(spec: Any) -> Any:
    return replace(spec, qat=1)

def main() -> int:
    train: TrainSpec = longer(TRAIN.train)
    return 2 if train.qat is None else 1
""",
}
# Each with what the refusal names.
REFUSED = {
    "global _HALF": """
_HALF = None

def main() -> int:
    global _HALF
    _HALF = 2
    return _HALF
""",
    "logging.raiseExceptions = False": """
logging.raiseExceptions = False

def main() -> int:
    return 1
""",
    "logging.disable(10)": """
logging.disable(10)

def main() -> int:
    return 1
""",
    "setattr hides": """
class Box:
    pass

def main() -> int:
    box = Box()
    setattr(box, "held", 1)
    return 1
""",
    "LIMIT is defined a second time": """
LIMIT = None
LIMIT = 2

def main() -> int:
    return 1 if LIMIT is None else 2
""",
    "ModelSpec: running code": """
def main() -> int:
    model = replace(TRAIN.model, num_layers=len(str(TRAIN)))
    return model.num_layers
""",
    "class Inner": """
def main() -> int:
    class Inner:
        pass
    return 1
""",
}


@pytest.fixture(scope="module")
def cut() -> Callable[[str], str]:
    recipe = tiny.recipe()

    def of(source: str) -> str:
        parse_module(ROOT, HEAD + source)
        return Cut(train_task(recipe), final_task(recipe), 1, ROOT).text()

    return of


@pytest.mark.parametrize("said", RUNS)
def test_a_file_does_what_its_source_does_where(
    cut: Callable[[str], str], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "train_gpt.py"
    path.write_text(cut(RUNS[said]), encoding="utf-8")

    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")

    assert ended.value.code == 1


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_followed_stops_the_export(cut: Callable[[str], str], said: str) -> None:
    with pytest.raises(ExportError) as raised:
        cut(REFUSED[said])

    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_only_some_machines_have_stands_behind_a_guard(
    cut: Callable[[str], str], tmp_path: Path
) -> None:
    parse_module(
        f"{ROOT}_triton",
        """
import triton
import triton.language as tl

_LANES = 32

@triton.jit
def _copy(ptr, LANES: tl.constexpr):
    \"\"\"Copy.

    In place.
    \"\"\"
    tl.store(ptr, tl.load(ptr + tl.arange(0, LANES)))

def copied() -> int:
    return _copy[(1,)](_LANES)
""",
    )
    path = tmp_path / "train_gpt.py"
    path.write_text(
        cut(
            f"""
def main() -> int:
    if len(str(TRAIN)) == 0:
        from {ROOT}_triton import copied

        return copied()
    return 1
"""
        ),
        encoding="utf-8",
    )
    made = []
    language = SimpleNamespace(constexpr=int)
    jit = lambda function: made.append(function) or function  # noqa: E731
    triton = SimpleNamespace(jit=jit, language=language)

    for here in ({"triton": None}, {"triton": triton, "triton.language": language}):
        with patch.dict(sys.modules, here), pytest.raises(SystemExit) as ended:
            runpy.run_path(str(path), run_name="__main__")
        assert ended.value.code == 1

    assert [function.__name__ for function in made] == ["_copy"]


def test_what_the_recipe_decides_is_still_cut(cut: Callable[[str], str]) -> None:
    source = """
def main() -> int:
    return 1 if TRAIN.model.mtp is None else unreached()

def unreached() -> int:
    return 2
"""

    assert "unreached" not in cut(source)
