"""Pieces of a log as text. Logs lie in the home: they are there when the node is gone."""

import codecs
from pathlib import Path
from typing import Any


def read_piece(path: Path, offset: int, limit: int, *, is_ended: bool) -> dict[str, Any]:
    """Up to `limit` bytes of a UTF-8 log from byte `offset` on, as `shapes.LogText` has them.

    A character that the limit cuts is left for the next piece; what is no UTF-8 becomes U+FFFD. An
    offset behind the end, or into a log that is not there yet, gives nothing. `is_ended`: whoever
    writes it is done; it must have been seen before the call.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            start = file.seek(min(offset, size))
            data = file.read(limit)
    except FileNotFoundError:
        return {"text": "", "next_offset": 0, "is_over": is_ended}
    end = start + len(data)
    is_over = is_ended and end >= size
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = decoder.decode(data, final=is_over)
    waiting, _ = decoder.getstate()
    return {"text": text, "next_offset": end - len(waiting), "is_over": is_over}
