"""Requests as an attacker would write them, byte by byte, to a real server: each is answered with a
4xx in one line, and the service goes on."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx2
import pytest

from tests.api_home import Home, filled
from tests.serving import PATIENCE_S, opened_service, served

JSON = {"Content-Type": "application/json"}
POSTS = ("sweeps", "sweeps:validate", "compare")
DEEP = 200_000


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    folder = tmp_path_factory.mktemp("hostile") / "home"
    with opened_service(folder, requests_per_second=1e6, burst=1_000_000) as services:
        yield filled(services)


@pytest.fixture(scope="module")
def http(home: Home) -> Iterator[httpx2.Client]:
    with served(home.services) as client:
        yield client


def assert_refused(answer: httpx2.Response, home: Home) -> None:
    """One line that tells nothing of the server, as problem+json; and the service goes on."""
    assert 400 <= answer.status_code < 500, answer.text[:500]
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert set(problem) == {"type", "title", "status", "detail", "instance"}
    assert problem["status"] == answer.status_code
    assert len(problem["detail"].splitlines()) == 1
    assert len(problem["detail"]) <= 2_000
    assert str(home.services.paths.home) not in answer.text
    assert "Traceback" not in answer.text


BODIES = {
    "nothing": b"",
    "not JSON": b"sweep: x",
    "half of it": b'{"sides": ["a", ',
    "broken UTF-8": b'{"sweep": "\xff\xfe", "sides": ["\xff", "\xc3"]}',
    "UTF-16": '{"sweep": "a", "sides": ["a", "b"]}'.encode("utf-16"),
    "NUL": b'{"sweep": "a\\u0000b", "sides": ["a\\u0000", "b"]}',
    "NUL bytes": b"\x00" * 1_000,
    "half a pair": b'{"sweep": "\\ud800", "sides": ["\\ud800", "\\udfff"]}',
    "deep lists": b'{"sides": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "long number": b'{"sweep": ' + b"9" * 500_000 + b"}",
    "infinity": b'{"sweep": Infinity, "sides": [NaN, -Infinity]}',
    "beyond a double": b'{"sweep": 1e99999, "sides": [1e99999, 2]}',
    "a name twice": b'{"sweep": "a: 1", "sweep": 2, "sides": ["a", "b"], "sides": 3}',
    "no object": b'["sweep", "sides"]',
    "null": b'{"sweep": null, "sides": null}',
    "many sides": json.dumps({"sides": ["a"] * 5_000}).encode(),
    "long side": json.dumps({"sides": ["a" * 100_000, "b"]}).encode(),
    "a path": json.dumps({"sides": ["../../../etc/passwd", "/etc/passwd"]}).encode(),
    "deep YAML": json.dumps({"sweep": "a: " + "[" * 60_000, "sides": "x"}).encode(),
    "deep block YAML": json.dumps(
        {"sweep": "".join(" " * level + f"k{level}:\n" for level in range(300))}
    ).encode(),
    "aliases": json.dumps(
        {"sweep": "a: &a [x]\n" + "".join(f"b{n}: &b{n} [*a, *a]\n" for n in range(30))}
    ).encode(),
    "merge key": json.dumps({"sweep": "a: &a {x: 1}\nb: {<<: *a}\n"}).encode(),
    "a tag": json.dumps({"sweep": "!!python/object/apply:os.system [id]"}).encode(),
    "huge numbers": json.dumps({"sweep": f"name: a\nbudget: {{usd: 1{'0' * 400}}}"}).encode(),
    "two documents": json.dumps({"sweep": "a: 1\n---\nb: 2\n"}).encode(),
    "a recipe outside": json.dumps({"sweep": "name: a\nrecipe: ../../../../etc/passwd\n"}).encode(),
    "a file outside": json.dumps(
        {"sweep": "name: a", "files": {"../../../tmp/x.yaml": "a: 1", "a/b.yaml": "a: 1"}}
    ).encode(),
    "a link's name": json.dumps({"sweep": "name: a", "files": {"sweep.yaml": "a: 1"}}).encode(),
}  # fmt: skip


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("kind", BODIES)
def test_a_hostile_body_is_refused_in_a_line(
    kind: str, path: str, home: Home, http: httpx2.Client
) -> None:
    began = time.monotonic()

    answer = http.post(f"/api/v1/{path}", content=BODIES[kind], headers=JSON)

    assert_refused(answer, home)
    assert time.monotonic() - began < PATIENCE_S
    assert home.services.queue.page().items  # nothing was added or lost
    assert len(home.services.queue.page().items) == len(home.ids)


@pytest.mark.parametrize("path", POSTS)
def test_ten_megabytes_are_cut_off(path: str, home: Home, http: httpx2.Client) -> None:
    body = b'{"sweep": "' + b"x" * 10_000_000 + b'"}'

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(body), 65_536):
            yield body[start : start + 65_536]

    said = http.post(f"/api/v1/{path}", content=body, headers=JSON)
    try:
        unsaid = http.post(f"/api/v1/{path}", content=pieces(), headers=JSON)
    except httpx2.WriteError:  # hung up on before all of it was sent
        unsaid = said

    for answer in (said, unsaid):
        assert_refused(answer, home)
        assert answer.status_code == 413


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-yaml", "multipart/form-data; boundary=x", "application/json;", "",
     "application/x-www-form-urlencoded", "text/json", "a" * 5_000],
)  # fmt: skip
def test_a_body_of_another_kind_is_refused(kind: str, home: Home, http: httpx2.Client) -> None:
    content = b'{"sides": ["x", "y"]}'

    answer = http.post("/api/v1/compare", content=content, headers={"Content-Type": kind})

    assert_refused(answer, home)


REFS = (
    "..", ".", "%2e%2e", "..%2f..%2fservice.db", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "a%00b", "%ff",
    "%c3%28", "*", "%25", "%5c..%5c", "warmdown%0d%0aX: y", "' OR 1=1 --", "a" * 5_000, "%20",
    "%f0%9f%8e%89", "_", "%",
)  # fmt: skip


@pytest.mark.parametrize("ref", REFS)
@pytest.mark.parametrize("rest", ["", "/finals", "/logs", "/spec", "/events", "/best"])
def test_no_reference_leads_out_of_the_queue(
    ref: str, rest: str, home: Home, http: httpx2.Client
) -> None:
    path = f"/api/v1/sweeps/{ref if '%' in ref else quote(ref)}{rest}"

    status, head, body = raw(http, f"GET {path} HTTP/1.1")

    assert 400 <= status < 500, body[:300]
    assert "x: y" not in head.lower()
    assert str(home.services.paths.home) not in body


QUERIES = (
    "sweeps?limit=0", "sweeps?limit=201", "sweeps?limit=1e3", "sweeps?limit=" + "9" * 5_000,
    "sweeps?limit=-1", "sweeps?state=nope", "sweeps?state=queued&state=%00", "sweeps?cursor=x",
    "sweeps?cursor=" + "A" * 511, "sweeps?cursor=%00", "sweeps?owner=" + "a" * 5_000,
    "sweeps/{done}/finals?cursor=W10=", "sweeps/{done}/finals?cursor=W10",
    "sweeps/{done}/finals?limit=x",
    "sweeps/{done}/logs?offset=-1", "sweeps/{done}/logs?offset=9" + "9" * 30,
    "sweeps/{done}/logs?limit=1", "sweeps/{done}/logs?limit=65537",
    "sweeps/{done}/logs?source=../../service.db", "sweeps/{done}/logs?source=%00",
    "sweeps/{done}/events?last_event_id=%00", "events?last_event_id=%ff",
)  # fmt: skip


@pytest.mark.parametrize("query", QUERIES)
def test_a_hostile_query_is_refused_in_a_line(query: str, home: Home, http: httpx2.Client) -> None:
    answer = http.get(f"/api/v1/{query.format(done=home.done)}")

    assert_refused(answer, home)


@pytest.mark.parametrize(
    "request_line",
    ["GET /api/v1/../../etc/passwd HTTP/1.1", "GET /ui/../../cli.py HTTP/1.1", "BREW / HTTP/1.1",
     "GET //etc/passwd HTTP/1.1", "GET /ui/..%2f..%2fcli.py HTTP/1.1", "TRACE / HTTP/1.1",
     "GET http://elsewhere/api/v1/me HTTP/1.1", "GET /\x01 HTTP/1.1", "nonsense"],
)  # fmt: skip
def test_a_hostile_request_line_reads_no_file(
    request_line: str, home: Home, http: httpx2.Client
) -> None:
    status, _, body = raw(http, request_line)

    assert 400 <= status < 500 or "elsewhere" in request_line, body[:300]
    assert "root:" not in body
    assert "import typer" not in body
    assert http.get("/api/v1/healthz").status_code == 200


def raw(http: httpx2.Client, request_line: str) -> tuple[int, str, str]:
    """Send a request as it is, uncorrected by any client; status, head and body of the answer."""
    address = urlsplit(str(http.base_url))
    head = f"{request_line}\r\nHost: {address.netloc}\r\nConnection: close\r\n\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=PATIENCE_S) as link:
        link.sendall(head.encode("latin-1"))
        received = b""
        while piece := link.recv(65_536):
            received += piece
    told, _, body = received.partition(b"\r\n\r\n")
    return int(told.split()[1]), told.decode("latin-1"), body.decode(errors="replace")


def test_a_header_of_nonsense_is_no_fault_of_ours(home: Home, http: httpx2.Client) -> None:
    for name in ("Authorization", "Last-Event-ID", "Idempotency-Key", "If-None-Match"):
        for value in (b"\xff\xfe", b"x" * 10_000, b"Bearer \xe9", b"Bearer"):
            answer = http.get("/api/v1/sweeps", headers={name: value})
            assert answer.status_code < 500, (name, value)
    assert len(home.services.queue.page().items) == len(home.ids)


def test_a_body_that_never_comes_holds_nobody_up(http: httpx2.Client, tmp_path: Path) -> None:
    address = urlsplit(str(http.base_url))
    head = (
        f"POST /api/v1/compare HTTP/1.1\r\nHost: {address.netloc}\r\n"
        "Content-Type: application/json\r\nContent-Length: 100000\r\n\r\n{"
    )
    links = [socket.create_connection((address.hostname, address.port)) for _ in range(60)]
    for link in links:
        link.sendall(head.encode())

    answer = http.get("/api/v1/sweeps")

    assert answer.status_code == 200
    for link in links:
        link.close()
