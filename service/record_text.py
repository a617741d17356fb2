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
MAX_LINE = 2_000  # characters of a line, where none that is expected is longer
_NEAR = 40  # lines that are looked at for the one that an edited line was
_NEAR_CHARS = 300  # of either line that are looked at for that
_NEAR_TRIES = 200  # expected lines for which it is tried
_SHOWN = 80  # characters of a claim in a message
# What a reader would take for a measurement: five digits, or four with a point among them.
_FORM = r"(?<![\w.,#])(?:\d+\.\d+|\d[\d,]{4,}(?:\.\d+)?)(?:[eE][+-]?\d{1,3}(?!\w))?"
_NUMBER = re.compile(_FORM)  # of a claim, whatever it touches: 1.0123bpb
_KNOWN = re.compile(_FORM + r"(?!\w)")  # of what was recorded: no start of a hash
_MIN_DIGITS = 4
_EDGES = "*`|:,;() "
NOT_RECORDED = "nothing that was recorded"


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
                yield Mismatch(SUBMISSION, shown(below), shown(actual[key]), NOT_RECORDED)
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
    """Where README.md differs from what it should say. `known`: the record's texts without the
    words of its people, whose numbers a line that somebody added may repeat."""
    extra: list[tuple[int, str]] = []
    lines = actual.splitlines()
    yield from _line_mismatches(README, expected.splitlines(), lines, extra)
    numbers = known_numbers(known)
    own = {place for place, _ in extra}
    for place, line in extra:
        if _is_row(line) and _is_of_results(lines, place, own):
            yield Mismatch(README, f"line {place}", shown(line), "no such row was recorded")
        for number in unknown_numbers(line, numbers):
            yield Mismatch(README, f"line {place}", shown(number), NOT_RECORDED)


def people_mismatches(words: Mapping[str, str | None], known: Sequence[str]) -> Iterator[Mismatch]:
    """Numbers in the words of a record's people, by field, that nothing in `known` has."""
    numbers = known_numbers(known)
    for field, text in words.items():
        for number in unknown_numbers(text or "", numbers):
            yield Mismatch(SUBMISSION, field, shown(number), NOT_RECORDED)


def known_numbers(texts: Sequence[str]) -> set[Decimal]:
    """Every number of texts that were recorded."""
    return {number for text in texts for number in _numbers(text, _KNOWN)}


def unknown_numbers(text: str, known: set[Decimal]) -> Iterator[Decimal]:
    """The measurements that a text claims and that are none of `known`, rounded either."""
    for number in _numbers(text, _NUMBER):
        if not any(agree(number, other) for other in known):
            yield number


def _is_row(line: str) -> bool:
    return line.lstrip().startswith("|")


def _is_of_results(lines: Sequence[str], place: int, own: set[int]) -> bool:
    """Whether the table around a line that was added, counted from 1, is the record's or one of
    seeds."""
    first = last = place
    while first > 1 and _is_row(lines[first - 2]):
        first -= 1
    while last < len(lines) and _is_row(lines[last]):
        last += 1
    has_seeds = any(
        cell.strip("*` ").lower() == "seed" for cell in _cells(lines[first - 1].strip())
    )
    return has_seeds or not own.issuperset(range(first, last + 1))


def text_mismatches(file: str, expected: str, actual: str) -> Iterator[Mismatch]:
    """Where a text that nobody may add to differs from what it should say."""
    extra: list[tuple[int, str]] = []
    yield from _line_mismatches(file, expected.splitlines(), actual.splitlines(), extra)
    for place, line in extra:
        yield Mismatch(file, f"line {place}", shown(line), NOT_RECORDED)


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
    longest = max([MAX_LINE, *map(len, expected)])
    for number, line in enumerate(actual, start=1):
        if len(line) > longest:
            raise DataError(
                f"{file}: line {number}: {len(line):,} characters; at most {longest:,} are read"
            )
    tries = 0
    matcher = SequenceMatcher(None, expected, actual, autojunk=False)
    for kind, first, last, start, stop in matcher.get_opcodes():
        if kind == "equal":
            continue
        given = {number: actual[number] for number in range(start, stop)}
        for number in range(first, last):
            if not expected[number].strip():
                continue  # an empty line says nothing
            tries += 1
            place = _nearest(expected[number], given) if tries <= _NEAR_TRIES else None
            if place is None:
                yield Mismatch(file, f"line {start + 1}", "nothing", shown(expected[number]))
                continue
            yield from _in_line(file, expected, number, given.pop(place), place + 1)
        extra += [(number + 1, line) for number, line in given.items() if line.strip()]


def _nearest(wanted: str, given: Mapping[int, str]) -> int | None:
    """Where the line is that a wanted one was edited into; None if none is like it."""
    starts = {place: line[:_NEAR_CHARS] for place, line in islice(given.items(), _NEAR)}
    near = get_close_matches(wanted[:_NEAR_CHARS], [*starts.values()], n=1, cutoff=0.5)
    return next((place for place, start in starts.items() if near and start == near[0]), None)


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


def _numbers(text: str, form: re.Pattern[str]) -> Iterator[Decimal]:
    """The numbers of a text that a reader would take for measurements."""
    for found in form.finditer(text):
        word = found[0].replace(",", "").lower()
        if len(word.partition("e")[0].lstrip("0.").replace(".", "")) >= _MIN_DIGITS:
            yield Decimal(word)
