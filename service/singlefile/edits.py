"""Cuts and replacements in a source, applied from the outside in."""

import ast
import io
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass

from service.singlefile.program import ExportError, Text

Piece = str | tuple[int, int]
"""New text, or a stretch of the source in which further edits apply."""


@dataclass(frozen=True, slots=True)
class Edit:
    """What stands in the place of source[start:stop]; `dedent` spaces go from each of its lines."""

    start: int
    stop: int
    pieces: tuple[Piece, ...] = ()
    dedent: int = 0


class Page:
    """A source with edits."""

    def __init__(self, text: Text) -> None:
        self.text = text
        self.edits: list[Edit] = []

    def replace(self, start: int, stop: int, *pieces: Piece, dedent: int = 0) -> None:
        self.edits.append(Edit(start, stop, pieces, dedent))

    def cut_lines(self, first: int, last: int, *pieces: Piece) -> None:
        """Take out whole lines, numbered from 1."""
        self.replace(self.text.line_start(first), self.text.line_start(last + 1), *pieces)

    def render(self, start: int, stop: int) -> str:
        """Return source[start:stop] as edited."""
        inside = [e for e in self.edits if start <= e.start and e.stop <= stop]
        inside.sort(key=lambda e: (e.start, -e.stop))
        return self._render(start, stop, inside)

    def _render(self, start: int, stop: int, edits: Sequence[Edit]) -> str:
        out: list[str] = []
        at = start
        for edit in edits:
            if edit.start < at:  # inside one that is done
                continue
            out.append(self.text.source[at : edit.start])
            out.append(self._made(edit, edits))
            at = edit.stop
        out.append(self.text.source[at:stop])
        return "".join(out)

    def _made(self, edit: Edit, edits: Sequence[Edit]) -> str:
        parts: list[str] = []
        for piece in edit.pieces:
            if isinstance(piece, str):
                parts.append(piece)
                continue
            start, stop = piece
            inner = [e for e in edits if e is not edit and start <= e.start and e.stop <= stop]
            parts.append(self._render(start, stop, inner))
        made = "".join(parts)
        return _dedented(made, edit.dedent) if edit.dedent else made


def indented(text: str) -> str:
    """Put four spaces before every line; ExportError for a string of several lines, other than a
    docstring, whose content that would change."""
    said = {
        node.body[0].lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None
    }
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_long = token.type == tokenize.STRING and token.start[0] != token.end[0]
        if is_long and token.start[0] not in said:
            raise ExportError(f"a string of several lines behind a guard: {token.string[:60]!r}")
    lines = text.splitlines(keepends=True)
    return "".join(f"    {line}" if line.strip() else line for line in lines)


def _dedented(text: str, width: int) -> str:
    """Take spaces from the head of every line; ExportError for a string of several lines, whose
    content that would change."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(f"if 1:\n{text}").readline))
    except (tokenize.TokenError, IndentationError) as error:
        raise ExportError(f"cannot read the cut text: {text[:60]!r}") from error
    for token in tokens:
        if token.type == tokenize.STRING and token.start[0] != token.end[0]:
            raise ExportError(f"a string of several lines inside a cut: {token.string[:60]!r}")
    lines = text.splitlines(keepends=True)
    gap = " " * width
    return "".join(line.removeprefix(gap) for line in lines)
