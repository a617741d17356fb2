"""What a run says on a terminal and into a log."""

import io

import pytest
from rich.console import Console

from service.talk import Talk

REASON = "RuntimeError: [/third_party/gloo/pair.cc:534] Connection closed [by peer]"


@pytest.mark.parametrize("on_terminal", [True, False])
def test_brackets_in_a_reason_are_said_as_they_are(on_terminal: bool):
    out = io.StringIO()
    console = Console(file=out, force_terminal=on_terminal, width=200, highlight=False)

    Talk(console).say("final_scored", reason=REASON)

    assert REASON in out.getvalue()


def test_a_log_gets_one_key_value_line_per_event():
    out = io.StringIO()

    Talk(Console(file=out, width=20)).say(
        "final_scored", bpb=1.25, bytes=16, why="two words", no=None
    )

    assert out.getvalue() == 'event=final_scored bpb=1.25 bytes=16 why="two words"\n'
