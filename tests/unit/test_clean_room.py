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


TRY = """\
import os, socket, subprocess, sys
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
to = ("127.0.0.1", 9)
ways = {
    "connect": lambda: udp.connect(to),
    "bind": lambda: udp.bind(to),
    "sendto": lambda: udp.sendto(b"1", to),
    "sendmsg": lambda: udp.sendmsg([b"1"], [], 0, to),
    "getaddrinfo": lambda: socket.getaddrinfo("localhost", 80),
    "getnameinfo": lambda: socket.getnameinfo(to, 0),
    "gethostbyname": lambda: socket.gethostbyname("localhost"),
    "Popen": lambda: subprocess.run(["true"]),
    "system": lambda: os.system("true"),
    "posix_spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "fork": lambda: os.fork(),
}
ways[sys.argv[1]]()
"""


WAYS = (
    *("connect", "bind", "sendto", "sendmsg", "getaddrinfo", "getnameinfo", "gethostbyname"),
    *("Popen", "system", "posix_spawn", "exec", "fork"),
)


@pytest.mark.parametrize("way", WAYS)
def test_no_socket_is_used_and_no_process_started(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clean_room, "_namespace", lambda: ())

    done = CleanRoom(os.environ).run({"try.py": TRY.encode()}, ["try.py", way])

    assert done.returncode == 1
    assert "PermissionError: no " in done.stderr.splitlines()[-1]


def test_a_program_without_an_end_is_ended() -> None:
    endless = {"endless.py": b"while True: pass"}

    with pytest.raises(TimeoutError, match="no end within 1 s"):
        CleanRoom(os.environ).run(endless, ["endless.py"], timeout_s=1)
    with pytest.raises(TimeoutError, match="no end within 1 s"):
        CleanRoom(os.environ, max_s=1).run(endless, ["endless.py"])


def test_a_program_on_a_cpu_gets_no_more_memory_than_is_allowed() -> None:
    large = {"large.py": b"print(len(bytearray(2 << 30)))"}

    done = CleanRoom(os.environ, max_bytes=1 << 30).run(large, ["large.py"])

    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "MemoryError")


def test_torch_works_in_the_room() -> None:
    program = b"import torch; print(int(torch.ones(3).sum()))"

    done = CleanRoom(os.environ).run({"sum.py": program}, ["sum.py"])

    assert (done.stdout, done.stderr) == ("3\n", "")


def test_a_program_that_fails_says_why_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    done = CleanRoom(os.environ).run({"fail.py": b"raise SystemExit('broken')"}, ["fail.py"])

    assert (done.returncode, done.stderr) == (1, "broken\n")
    assert list(tmp_path.iterdir()) == []
