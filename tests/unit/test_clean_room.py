"""The clean room: a program finds what it is handed, and nothing else."""

import json
import os
import socket

import pytest

from service import clean_room
from service.clean_room import CleanRoom, network

SEE = """\
import json, os, sys
absent = []
for name in ("service", "trainer", "tune_spaces"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        absent.append(name)
print(json.dumps({
    "absent": absent, "files": sorted(os.listdir()), "words": sys.argv, "own": __name__,
    "secret": os.environ.get("SECRET"), "threads": os.environ["OMP_NUM_THREADS"],
    "path": [entry for entry in sys.path if entry in ("", os.getcwd())],
}))
"""
CALL = """\
import socket, sys
try:
    socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=5)
except OSError as error:
    sys.exit(f"refused: {type(error).__name__}")
"""


def test_a_program_finds_its_files_and_none_of_our_packages() -> None:
    room = CleanRoom({**os.environ, "SECRET": "token"})

    done = room.run(
        {"see.py": SEE.encode(), "w.fw": b"1"}, ["see.py", "--score", "w.fw"], threads=2
    )

    seen = json.loads(done.stdout)
    assert seen["absent"] == ["service", "trainer", "tune_spaces"]
    assert seen["files"] == ["see.py", "w.fw"]
    assert seen["words"] == ["see.py", "--score", "w.fw"]
    assert (seen["own"], seen["secret"], seen["threads"]) == ("__main__", None, "2")
    assert seen["path"] == []


@pytest.mark.parametrize("has_namespace", [True, False])
def test_a_program_reaches_no_network(has_namespace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_namespace:
        monkeypatch.setattr(clean_room, "_namespace", lambda: ())
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        port = server.getsockname()[1]

        done = CleanRoom(os.environ).run({"call.py": CALL.encode()}, ["call.py", str(port)])

        assert done.returncode == 1
        assert done.stderr.startswith("refused:")
        with pytest.raises(TimeoutError):
            server.accept()
    assert has_namespace or network() == "sockets refused"


def test_a_program_that_fails_says_why_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    done = CleanRoom(os.environ).run({"fail.py": b"raise SystemExit('broken')"}, ["fail.py"])

    assert (done.returncode, done.stderr) == (1, "broken\n")
    assert list(tmp_path.iterdir()) == []
