"""The house rules that can be read off the source: budgets, names, docstrings, literals."""

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from trainer.protocol import ARTIFACT_BYTES_CAP

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("service", "trainer", "tune_spaces")

FILE_LINES = 400
FUNCTION_LINES = 60
PARAMETERS = 7
# What `train` takes, and where to leave what.
MORE_PARAMETERS = {"trainer/run.py:grow_trunk": 8}
NESTING = 4
# A method of so few lines says what it does; torch and Ray say it of the methods they call.
SELF_EVIDENT_LINES = 5
FRAMEWORK_METHODS = {"forward", "load_state_dict", "reset_parameters", "state_dict", "step"}
EMPTY_NAMES = {"util", "utils", "helper", "helpers", "common", "misc"}
EMPTY_NAMES |= {"manager", "managers", "handler", "handlers"}

Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)


class Source(NamedTuple):
    """A file of the three packages: its path from the root, its text and its tree."""

    path: str
    text: str
    tree: ast.Module


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    paths = sorted(path for root in PACKAGES for path in (ROOT / root).rglob("*.py"))
    texts = [(path, path.read_text(encoding="utf-8")) for path in paths]
    return [Source(p.relative_to(ROOT).as_posix(), text, ast.parse(text)) for p, text in texts]


def test_files_stay_within_their_budget(sources: list[Source]) -> None:
    lengths = {source.path: len(source.text.splitlines()) for source in sources}

    long = [f"{path}: {num} lines" for path, num in lengths.items() if num > FILE_LINES]

    _none(long, f"split by noun; a file has at most {FILE_LINES} lines")


def test_functions_stay_within_their_budget(sources: list[Source]) -> None:
    long = [
        f"{source.path}:{function.lineno}: {function.name} has {num} lines"
        for source in sources
        for function in _functions(source.tree)
        if (num := (function.end_lineno or 0) - function.lineno + 1) > FUNCTION_LINES
    ]

    _none(long, f"split by step; a function has at most {FUNCTION_LINES} lines")


def test_functions_take_few_parameters(sources: list[Source]) -> None:
    # The flags of a command are its parameters; test_cli_surface.py lists those.
    greedy = [
        f"{source.path}:{function.lineno}: {function.name} takes {num}"
        for source in sources
        for function in _functions(source.tree)
        if (num := _num_parameters(function))
        > MORE_PARAMETERS.get(f"{source.path}:{function.name}", PARAMETERS)
        and not (_is_command(function) or _is_kernel(function))
    ]

    _none(greedy, f"hand over a frozen value; a function takes at most {PARAMETERS} parameters")


def test_functions_nest_shallowly(sources: list[Source]) -> None:
    deep = [
        f"{source.path}:{function.lineno}: {function.name} nests {depth} deep"
        for source in sources
        for function in _functions(source.tree)
        if (depth := _depth(function.body)) > NESTING
    ]

    _none(deep, f"return early or name the inner step; blocks nest at most {NESTING} deep")


def test_modules_are_named_after_what_they_hold(sources: list[Source]) -> None:
    empty = [
        source.path
        for source in sources
        if EMPTY_NAMES & set(re.split(r"[/_.]", source.path.removesuffix(".py").lower()))
    ]

    _none(empty, "name the module after the noun it owns")


def test_everything_public_has_a_docstring(sources: list[Source]) -> None:
    silent = [
        f"{source.path}:{getattr(node, 'lineno', 1)}: {getattr(node, 'name', 'the module')}"
        for source in sources
        for node in _documentable(source.tree)
        if not ast.get_docstring(node)
    ]

    _none(silent, "say in one imperative line what it does and what its types cannot say")


def test_the_byte_cap_is_spelled_in_one_place(sources: list[Source]) -> None:
    text = re.compile(r"16([_,. ]?)000\1(?:000)(?!\d)")
    elsewhere = [source for source in sources if source.path != "trainer/protocol.py"]

    spelled = [
        f"{source.path}:{number}"
        for source in elsewhere
        for number, line in enumerate(source.text.splitlines(), 1)
        if text.search(line)
    ]
    spelled += [
        f"{source.path}:{node.lineno}"
        for source in elsewhere
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Constant | ast.BinOp) and _number(node) == ARTIFACT_BYTES_CAP
    ]

    _none(spelled, "import ARTIFACT_BYTES_CAP from trainer.protocol")


def test_the_environment_is_read_at_the_edges_only(sources: list[Source]) -> None:
    def reads_it(node: ast.AST) -> bool:
        names = {"environ", "environb", "getenv", "putenv"}
        if isinstance(node, ast.ImportFrom):
            return node.module == "os" and bool(names & {alias.name for alias in node.names})
        return isinstance(node, ast.Attribute) and node.attr in names

    inside = [s for s in sources if not s.path.startswith(("service/cli", "trainer/runtime/"))]

    found = _where(inside, reads_it)

    _none(found, "take the value as an argument; service/cli*.py and trainer/runtime/ read it")


def test_only_the_command_line_prints(sources: list[Source]) -> None:
    def prints(node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == "print"

    found = _where([s for s in sources if not s.path.startswith("service/cli")], prints)

    _none(found, "return the value, or log it with logging.getLogger(__name__)")


def test_imports_are_absolute(sources: list[Source]) -> None:
    def is_relative(node: ast.AST) -> bool:
        return isinstance(node, ast.ImportFrom) and node.level > 0

    _none(_where(sources, is_relative), "write the full name, such as `from trainer.specs import`")


def test_an_open_task_names_who_and_why(sources: list[Source]) -> None:
    mark, full = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b"), re.compile(r"TODO\(\w+\): .+ because .+")
    vague = [
        f"{source.path}:{token.start[0]}: {token.string}"
        for source in sources
        for token in tokenize.generate_tokens(io.StringIO(source.text).readline)
        if token.type == tokenize.COMMENT
        and mark.search(token.string)
        and not full.search(token.string)
    ]

    _none(vague, "write `TODO(name): what, because why`, or do it")


def _none(found: list[str], advice: str) -> None:
    assert not found, f"{advice}:\n" + "\n".join(found)


def _where(sources: list[Source], matches: Callable[[ast.AST], bool]) -> list[str]:
    return [
        f"{source.path}:{getattr(node, 'lineno', 0)}"
        for source in sources
        for node in ast.walk(source.tree)
        if matches(node)
    ]


def _functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, FUNCTIONS))


def _decorators(function: Function) -> set[str]:
    """`property`, `app.command`, `x.setter`: without what is in the parentheses."""
    return {ast.unparse(item).partition("(")[0] for item in function.decorator_list}


def _is_command(function: Function) -> bool:
    return any(name.endswith((".command", ".callback")) for name in _decorators(function))


def _is_kernel(function: Function) -> bool:
    """A kernel of Triton's takes pointers, strides and sizes one by one."""
    return "triton.jit" in _decorators(function)


def _num_parameters(function: Function) -> int:
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    stars = [star for star in (given.vararg, given.kwarg) if star is not None]
    return len(names) + len(stars) - (names[:1] in (["self"], ["cls"]))


def _depth(body: list[ast.stmt]) -> int:
    """How many blocks stand around the innermost statement; an elif is no deeper than its if."""
    return max((_depth_of(statement) for statement in body), default=0)


def _depth_of(node: ast.stmt) -> int:
    if not isinstance(node, BLOCKS):
        return 0  # a function in the function has a depth of its own
    cases = node.cases if isinstance(node, ast.Match) else getattr(node, "handlers", [])
    inside = [*(part.body for part in cases), getattr(node, "body", [])]
    inside.append(getattr(node, "finalbody", []))
    orelse = getattr(node, "orelse", [])
    is_elif = isinstance(node, ast.If) and len(orelse) == 1 and isinstance(orelse[0], ast.If)
    if not is_elif:
        inside.append(orelse)
    deepest = 1 + max(_depth(body) for body in inside)
    return max(deepest, _depth(orelse)) if is_elif else deepest


def _documentable(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | Function]:
    """The module, its public classes and functions, and what is public in those classes."""
    yield tree
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, *FUNCTIONS)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from _public_methods(node)


def _public_methods(owner: ast.ClassDef) -> Iterator[Function]:
    for node in owner.body:
        if not isinstance(node, FUNCTIONS) or node.name.startswith(("_", "on_")):
            continue
        is_small = (node.end_lineno or 0) - node.lineno < SELF_EVIDENT_LINES
        if not is_small and node.name not in FRAMEWORK_METHODS:
            yield node


def _number(node: ast.expr) -> int | float | None:
    """The value of a literal, or of arithmetic on small literals such as 16 * 10**6."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, int | float) else None
    if not isinstance(node, ast.BinOp):
        return None
    left, right = _number(node.left), _number(node.right)
    if left is None or right is None or max(abs(left), abs(right)) > ARTIFACT_BYTES_CAP:
        return None
    match node.op:
        case ast.Mult():
            return left * right
        case ast.Add():
            return left + right
        case ast.Pow() if 0 <= right <= 9:
            return left**right
    return None
