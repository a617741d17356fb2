"""Where a record's texts say something else than they should, each time as file, field and both
numbers. Pure.

Every line that is expected must be there. A README may have lines of its own, for people explain
their work; a number in them must be one that the record knows.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from difflib import SequenceMatcher, get_close_matches
from itertools import islice
from typing import Any

from service.record_folder import README, SUBMISSION
from service.record_log import without_curve
from service.run_logs import agree
from trainer.errors import DataError

MAX_LINES = 5_000
_NEAR = 40  # lines that are looked at for the one that an edited line was
_SHOWN = 80  # characters of a claim in a message
# What a reader would take for a measurement: five digits, or four with a point among them.
_NUMBER = re.compile(r"(?<![\w.,#-])(?:\d+\.\d+|\d[\d,]{4,}(?:\.\d+)?)(?![\w])")
_MIN_DIGITS = 4
_EDGES = "*`|:,;() "


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One claim that does not hold."""

    file: str
    field: str
    claimed: str
    found: str

    def line(self) -> str:
        """The one line that a user reads."""
        return f"{self.file}: {self.field}: claimed {self.claimed}, found {self.found}"


def shown(value: Any) -> str:
    """A claim as it is printed: short and, whatever is in it, one line of plain characters."""
    text = (
        str(value) if isinstance(value, int | float | Decimal) else json.dumps(value, default=str)
    )
    text = text.strip('"') if isinstance(value, str) else text
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def claim_mismatches(expected: Any, actual: Any, path: str = "") -> Iterator[Mismatch]:
    """Where submission.json differs from what it should say."""
    if isinstance(expected, Mapping) and isinstance(actual, Mapping):
        for key in [*expected, *(key for key in actual if key not in expected)]:
            below = f"{path}.{key}" if path else str(key)
            if key not in actual:
                yield Mismatch(SUBMISSION, below, "nothing", shown(expected[key]))
            elif key not in expected:
                nothing = "nothing that was recorded"
                yield Mismatch(SUBMISSION, shown(below), shown(actual[key]), nothing)
            else:
                yield from claim_mismatches(expected[key], actual[key], below)
    elif not _same(expected, actual):
        yield Mismatch(SUBMISSION, path, shown(actual), shown(expected))


def _same(expected: Any, actual: Any) -> bool:
    if isinstance(expected, bool) or not isinstance(expected, int | float):
        return type(expected) is type(actual) and expected == actual
    if isinstance(actual, bool) or not isinstance(actual, int | Decimal):
        return False
    return Decimal(str(expected)) == Decimal(actual)


def readme_mismatches(expected: str, actual: str, known: Sequence[str]) -> Iterator[Mismatch]:
    """Where README.md differs from what it should say. `known`: the record's other texts, whose
    numbers a line that somebody added may repeat."""
    extra: list[tuple[int, str]] = []
    yield from _line_mismatches(README, expected.splitlines(), actual.splitlines(), extra)
    numbers = {number for text in (expected, *known) for number in _numbers(text)}
    for place, line in extra:
        for number in _numbers(line):
            if not any(agree(number, other) for other in numbers):
                yield Mismatch(README, f"line {place}", str(number), "nothing that was recorded")


def text_mismatches(file: str, expected: str, actual: str) -> Iterator[Mismatch]:
    """Where a text that nobody may add to differs from what it should say."""
    extra: list[tuple[int, str]] = []
    yield from _line_mismatches(file, expected.splitlines(), actual.splitlines(), extra)
    for place, line in extra:
        yield Mismatch(file, f"line {place}", shown(line), "nothing that was recorded")


def log_mismatches(
    file: str, head: Sequence[str], tail: Sequence[str], actual: str, steps: int
) -> Iterator[Mismatch]:
    """Where a log differs from its head and its tail, or its curve is out of order."""
    rest, fault = without_curve(actual.splitlines(), steps)
    if fault is not None:
        yield Mismatch(file, "training curve", fault, "steps in order")
    yield from text_mismatches(file, "\n".join([*head, *tail]), "\n".join(rest))


def _line_mismatches(
    file: str, expected: Sequence[str], actual: Sequence[str], extra: list[tuple[int, str]]
) -> Iterator[Mismatch]:
    """Compare line by line; what is there beyond the expected goes to `extra` with its number."""
    if len(actual) > MAX_LINES:
        raise DataError(f"{file}: {len(actual):,} lines; at most {MAX_LINES:,} are read")
    matcher = SequenceMatcher(None, expected, actual, autojunk=False)
    for kind, first, last, start, stop in matcher.get_opcodes():
        if kind == "equal":
            continue
        given = {number: actual[number] for number in range(start, stop)}
        for number in range(first, last):
            if not expected[number].strip():
                continue  # an empty line says nothing
            candidates = [*islice(given.values(), _NEAR)]
            near = get_close_matches(expected[number], candidates, n=1, cutoff=0.5)
            if not near:
                yield Mismatch(file, f"line {start + 1}", "nothing", shown(expected[number]))
                continue
            place = next(each for each, line in given.items() if line == near[0])
            del given[place]
            yield from _in_line(file, expected, number, near[0], place + 1)
        extra += [(number + 1, line) for number, line in given.items() if line.strip()]


def _in_line(
    file: str, expected: Sequence[str], number: int, actual: str, place: int
) -> Iterator[Mismatch]:
    """Name what differs within a line: cells of a table by row and column, else the first word."""
    right, given = _cells(expected[number]), _cells(actual)
    if right and len(right) == len(given):
        header = _header(expected, number)
        for column, claim, found in zip(header, given, right, strict=False):
            if claim != found:
                field = f"{header[0]} {right[0]}, {column}"
                yield Mismatch(file, field, shown(claim), shown(found))
        return
    words, claims = expected[number].split(), actual.split()
    at = next(
        (i for i, (a, b) in enumerate(zip(words, claims, strict=False)) if a != b),
        min(len(words), len(claims)),
    )
    found = words[at] if at < len(words) else ""
    claim = claims[at] if at < len(claims) else ""
    label, colon, value = found.partition(":")
    if colon and claim.startswith(f"{label}:"):
        yield Mismatch(file, label, shown(claim.partition(":")[2]), shown(value))
        return
    before = " ".join(words[max(0, at - 3) : at]).strip(_EDGES)
    field = before or f"line {place}"
    yield Mismatch(file, field, shown(claim.strip(_EDGES)), shown(found.strip(_EDGES)))


def _cells(line: str) -> list[str]:
    """The cells of a table's row; empty for another line."""
    if not line.startswith("|"):
        return []
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _header(lines: Sequence[str], number: int) -> list[str]:
    """The header of the table that a row is in."""
    while number > 0 and lines[number - 1].startswith("|"):
        number -= 1
    return _cells(lines[number])


def _numbers(text: str) -> Iterator[Decimal]:
    """The numbers of a text that a reader would take for measurements."""
    for found in _NUMBER.finditer(text):
        word = found[0].replace(",", "")
        if len(word.lstrip("0.").replace(".", "")) >= _MIN_DIGITS:
            yield Decimal(word)
