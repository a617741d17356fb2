"""The code that is counted: the trainer package as one file that Python runs.

`zip` holds the sources as they are, so that what was tested is what ships. `packed` holds them
without what only readers need, in one xz stream, and unpacks them into a temporary folder. Both
are `code.pyz`: a file `code.py` beside the weights would hide the standard library's `code`. What
only makes data, brings in what others made, or chooses what to write is no part of training or of
scoring, so it is not shipped. `python code.pyz …` needs the third-party packages only.
"""

import ast
import hashlib
import io
import lzma
import tokenize
import zipfile
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final, Literal

from trainer.runtime.files import write_bytes

PACKAGE: Final = "trainer"
CODE_FILE: Final = "code.pyz"
NOT_SHIPPED: Final = frozenset(
    f"trainer/data/{name}"
    for name in (
        "embedded", "fetch.py", "download.py", "prepare.py", "documents.py", "partition.py",
        "overlap.py", "staging.py",
    )
) | {
    "trainer/choosing.py", "trainer/importer", "trainer/liveness", "trainer/runtime/environment.py",
    "trainer/evaluate/probes", "trainer/evaluate/profiles.py", "trainer/evaluate/timing.py",
    "trainer/finalize/fit.py", "trainer/finalize/plans.py", "trainer/finalize/rate.py",
    "trainer/finalize/shares.py",
}  # fmt: skip
EPOCH: Final = (1980, 1, 1, 0, 0, 0)  # the earliest date that a zip can hold
MAIN: Final = b"""\
from trainer.__main__ import main

raise SystemExit(main())
"""
PAYLOAD: Final = "trainer.xz"
# Compilers of kernels read sources from files, so nothing is imported from memory. The real
# package takes the place of this module while it is being imported.
UNPACK: Final = b"""\
import atexit,importlib,lzma,pathlib,shutil,sys,tempfile
top=tempfile.mkdtemp()
atexit.register(shutil.rmtree,top,True)
parts=lzma.decompress(__loader__.get_data("trainer.xz")).decode().split("\\0")
for name,text in zip(parts[::2],parts[1::2]):
 path=pathlib.Path(top,name)
 path.parent.mkdir(exist_ok=True,parents=True)
 path.write_text(text,"utf-8")
sys.path.insert(0,top)
del sys.modules["trainer"]
importlib.import_module("trainer")
"""

Position = tuple[int, int]  # line from 1, character from 0


def code_files() -> dict[str, bytes]:
    """Return the sources that ship, by path from the package's parent, in sorted order."""
    found: dict[str, bytes] = {}
    _collect(files(PACKAGE), PACKAGE, found)
    return dict(sorted(found.items()))


def code_digest() -> str:
    """Return the sha256 over every shipped name and content."""
    digest = hashlib.sha256()
    for name, content in code_files().items():
        # Each part is hashed at a fixed length, so no two trees can spell the same bytes.
        digest.update(hashlib.sha256(name.encode()).digest())
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def write_code(folder: Path, form: Literal["zip", "packed"]) -> Path:
    """Write the code into `folder` and return its path.

    Equal sources give equal bytes with one version of zlib or liblzma, whatever the Python.
    """
    entries = {"__main__.py": MAIN}
    if form == "zip":
        entries |= code_files()
    else:
        sources = {name: minify(content.decode()) for name, content in code_files().items()}
        parts = "\0".join(part for item in sources.items() for part in item).encode()
        entries |= {
            "trainer.py": UNPACK,
            PAYLOAD: lzma.compress(parts, preset=9 | lzma.PRESET_EXTREME),
        }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.create_system = 3  # Unix, wherever this runs
            entry.external_attr = 0o100644 << 16
            method = zipfile.ZIP_STORED if name == PAYLOAD else zipfile.ZIP_DEFLATED
            archive.writestr(entry, content, method, compresslevel=9)
    path = folder / CODE_FILE
    write_bytes(path, buffer.getvalue())
    return path


def minify(source: str) -> str:
    """Return source without comments, docstrings, spare space and annotations that nobody reads.

    Fields and decorated functions keep theirs, and a file that reads `__doc__` its docstrings.
    Text is cut, never written anew, so every Python gives the same.
    """
    out: list[str] = []
    last, depth = "", 0
    for kind, text in _kept_tokens(source):
        depth += (kind == tokenize.INDENT) - (kind == tokenize.DEDENT)
        if kind == tokenize.NEWLINE:
            out.append("\n" if last else "")
            last = ""
        elif text and kind not in (tokenize.INDENT, tokenize.COMMENT, tokenize.NL):
            out.append(" " * (_is_word(last[-1]) and _is_word(text[0]) if last else depth))
            out.append(text)
            last = text
    return "".join(out)


def _is_word(char: str) -> bool:
    return char.isalnum() or char in "_'\""


def _kept_tokens(source: str) -> Iterator[tuple[int, str]]:
    """Yield kind and text of each token that stays."""
    marks = _Marks(source)
    skips, level, previous, behind = False, 0, (0, 0), (0, 0)
    for kind, text, start, end, _ in tokenize.generate_tokens(io.StringIO(source).readline):
        if start < behind:
            continue
        if skips and (level or text not in (",", "=", ")", ":")):
            level += (text in ("(", "[")) - (text in (")", "]"))
            continue
        skips = (text == ":" and previous in marks.names) or (
            text == "->" and marks.cuts_arrow(start)
        )
        previous = end
        if skips:
            continue
        if start in marks.strings:
            behind, text = marks.strings[start]
        yield kind, text


class _Marks:
    """Where a source may be cut. `names` are the ends of names whose annotations go, `strings` the
    starts of strings that become one token, each with its end and what it becomes."""

    def __init__(self, source: str) -> None:
        self.names: set[Position] = set()
        self.strings: dict[Position, tuple[Position, str]] = {}
        self._lines = io.StringIO(source).readlines()
        self._decorated: list[tuple[Position, Position]] = []
        nodes = list(ast.walk(ast.parse(source)))
        fields = {id(n) for node in nodes if isinstance(node, ast.ClassDef) for n in node.body}
        for node in nodes:
            match node:
                case ast.FunctionDef():
                    self._mark_annotations(node)
                case ast.AnnAssign(target=target, value=ast.expr()) if id(node) not in fields:
                    self.names.add(self._span(target)[1])
                case ast.JoinedStr():
                    # One token up to Python 3.11, several since.
                    start, end = self._span(node)
                    self.strings.setdefault(start, (end, self._text(start, end)))
            match node:
                case ast.Module(body=body) | ast.ClassDef(body=body) | ast.FunctionDef(body=body):
                    if "__doc__" not in source:
                        self._mark_docstring(body)

    def cuts_arrow(self, start: Position) -> bool:
        """Whether the arrow at `start` is that of a function without decorators."""
        return not any(first <= start < body for first, body in self._decorated)

    def _mark_annotations(self, function: ast.FunctionDef) -> None:
        if function.decorator_list:
            self._decorated.append((self._span(function)[0], self._span(function.body[0])[0]))
            return
        args = function.args
        given = (*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg)
        for arg in given:
            if arg is not None and arg.annotation is not None:
                line, column = self._span(arg)[0]
                self.names.add((line, column + len(arg.arg)))

    def _mark_docstring(self, body: list[ast.stmt]) -> None:
        match body:
            case [ast.Expr(value=ast.Constant(value=str()) as text), *others]:
                start, end = self._span(text)
                self.strings[start] = (end, "" if others else "0")

    def _span(self, node: ast.expr | ast.stmt | ast.arg) -> tuple[Position, Position]:
        """A node counts columns in bytes of UTF-8, a token in characters."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        places = ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
        start, end = (
            (line, len(self._lines[line - 1].encode()[:column].decode())) for line, column in places
        )
        return start, end

    def _text(self, start: Position, end: Position) -> str:
        lines = self._lines[start[0] - 1 : end[0]]
        lines[-1] = lines[-1][: end[1]]
        lines[0] = lines[0][start[1] :]
        return "".join(lines)


def _collect(folder: Traversable, prefix: str, found: dict[str, bytes]) -> None:
    for item in folder.iterdir():
        name = f"{prefix}/{item.name}"
        if name in NOT_SHIPPED:
            continue
        if item.is_dir():
            _collect(item, name, found)
        elif name.endswith(".py"):
            found[name] = item.read_bytes()
