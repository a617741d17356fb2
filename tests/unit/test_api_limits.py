"""The door: names, origins, rates, bodies, headers, logs and counts."""

import http.client
import json
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from service.api.app import make_app
from service.api.limits import RateLimiter
from service.api.redaction import Redacting, redact
from service.api.services import Services
from tests.serving import (
    PATIENCE_S,
    client_of,
    home_with,
    opened_service,
    served,
    submission,
    token,
)
from trainer.data.shards import Dataset

TOKEN = "fwy_" + "a" * 43


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset) -> Iterator[Services]:
    home = home_with(tmp_path_factory.mktemp("limits"), tiny_dataset)
    with opened_service(home, burst=10_000, allowed_hosts=("Fairway.example",)) as made:
        yield made


@pytest.fixture(scope="module")
def header(services: Services) -> dict[str, str]:
    return token(services, "ada", "admin")


@pytest.fixture(scope="module")
def client(services: Services, header: dict[str, str]) -> Iterator[TestClient]:
    with client_of(services, headers=header) as made:
        yield made


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.1:7878", "localhost:1", "LOCALHOST", "[::1]:7878",
     "fairway.example", "FAIRWAY.example:443"],
)  # fmt: skip
def test_the_service_answers_to_its_names(client: TestClient, host: str):
    assert client.get("/api/v1/me", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "fairway.example.evil", "localhost@evil", "",
     "[::1", "localhost evil", "0.0.0.0", "169.254.169.254"],
)  # fmt: skip
def test_a_name_that_was_bound_to_us_from_outside_is_refused(client: TestClient, host: str):
    answer = client.get("/api/v1/me", headers={"Host": host})

    assert answer.status_code == 400
    assert "--allowed-host" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1", 404),
        ("https://127.0.0.1", 404),
        ("http://evil.example", 403),
        ("http://127.0.0.1:8080", 403),
        ("null", 403),
        ("http://127.0.0.1.evil.example", 403),
    ],
)
def test_another_site_may_not_change_anything(client: TestClient, origin: str, status: int):
    asked = client.post("/api/v1/sweeps/none:cancel", headers={"Origin": origin})

    assert asked.status_code == status
    assert client.get("/api/v1/me", headers={"Origin": origin}).status_code == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "",
             "application/yaml", "text/json"],
)  # fmt: skip
def test_a_body_that_is_not_said_to_be_json_is_refused(client: TestClient, kind: str):
    content = json.dumps(submission()).encode()

    answer = client.post("/api/v1/sweeps", content=content, headers={"Content-Type": kind})

    assert answer.status_code == 415
    assert client.post("/api/v1/sweeps/none:pause", content=b"x").status_code == 415


@contextmanager
def raw(client: httpx2.Client) -> Iterator[http.client.HTTPConnection]:
    """A connection on which anything may be sent."""
    url = client.base_url
    connection = http.client.HTTPConnection(url.host, url.port, timeout=PATIENCE_S)
    try:
        yield connection
    finally:
        connection.close()


def test_a_body_over_the_limit_is_cut_off_however_it_is_sent(services: Services, header):
    big = b'{"sweep": "' + b"x" * 10_000_000 + b'"}'
    asked = {**header, "Content-Type": "application/json"}
    chunks = [big[i : i + 65_536] for i in range(0, len(big), 65_536)]

    with served(services) as client:
        for path in ("/api/v1/sweeps", "/api/v1/sweeps:validate", "/api/v1/compare"):
            with raw(client) as connection:
                connection.putrequest("POST", path)
                for name, value in {**asked, "Content-Length": str(len(big))}.items():
                    connection.putheader(name, value)
                connection.endheaders()
                told = connection.getresponse()  # before a byte of it is sent
                assert told.status == 413
                assert told.headers["content-type"] == "application/problem+json"
            answer = client.post(path, content=iter(chunks[:40]), headers=asked)
            assert answer.status_code == 413
            assert answer.headers["content-type"] == "application/problem+json"
        assert client.get("/healthz").status_code == 200


def test_a_content_length_that_lies_gets_nobody_in(services: Services, header):
    body = json.dumps(submission()).encode()
    with served(services) as client:
        with socket.create_connection((client.base_url.host, client.base_url.port)) as sock:
            head = (
                f"POST /api/v1/sweeps HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10\r\n"
                f"Authorization: {header['Authorization']}\r\n"
                "Content-Type: application/json\r\n\r\n"
            )
            sock.sendall(head.encode() + body)
            sock.settimeout(PATIENCE_S)
            answer = sock.recv(65_536)
        assert b" 400 " in answer.split(b"\r\n")[0]
        assert client.get("/healthz").status_code == 200


def test_who_asks_too_fast_is_told_when_to_come_back(tmp_path: Path):
    with (
        opened_service(tmp_path / "home", requests_per_second=0.01, burst=5) as services,
        client_of(services) as client,
    ):
        answers = [client.get("/api/v1/sweeps") for _ in range(7)]

    assert [answer.status_code for answer in answers] == [200] * 5 + [429] * 2
    assert answers[-1].headers["content-type"] == "application/problem+json"
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 100


def test_each_user_has_a_rate_of_their_own_and_guessing_tokens_costs_more(tmp_path: Path):
    with opened_service(tmp_path / "home", requests_per_second=0.01, burst=30) as services:
        headers = [token(services, name, "reader") for name in ("ann", "bob")]
        with client_of(services) as client:

            def ask(header: dict[str, str]) -> int:
                return client.get("/api/v1/me", headers=header).status_code

            assert [ask(headers[0]) for _ in range(32)] == [200] * 31 + [429]
            assert ask(headers[1]) == 200
            wrong = [ask({"Authorization": f"Bearer fwy_{i:043d}"}) for i in range(5)]

    assert wrong == [401, 401, 401, 429, 429]


def test_writing_without_a_token_costs_as_much_as_with_a_wrong_one(tmp_path: Path):
    with opened_service(tmp_path / "home", requests_per_second=0.01, burst=30) as services:
        token(services, "ann", "reader")
        with client_of(services) as client:
            wrote = [client.post("/api/v1/sweeps/a:stop").status_code for _ in range(5)]
        with client_of(services) as client:
            read = [client.get("/api/v1/me").status_code for _ in range(5)]

    assert wrote == [401, 401, 401, 429, 429]
    assert read == [401] * 5


def test_a_good_token_opens_where_others_have_emptied_the_addresss_bucket(tmp_path: Path):
    with opened_service(tmp_path / "home", requests_per_second=0.01, burst=5) as services:
        header = token(services, "ann", "reader")
        with client_of(services) as client:
            others = [client.get("/api/v1/me").status_code for _ in range(6)]
            wrong = client.get("/api/v1/me", headers={"Authorization": f"Bearer {TOKEN}"})
            good = client.get("/api/v1/me", headers=header)

    assert others == [401] * 5 + [429]
    assert wrong.status_code == 429
    assert good.json()["user"] == "ann"


def test_a_bucket_fills_again_and_only_the_last_keys_are_kept():
    now = [0.0]
    limiter = RateLimiter(2.0, 3, max_keys=100, clock=lambda: now[0])

    assert [limiter.take("a") for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    now[0] = 0.5
    assert limiter.take("a") == 0.0
    for i in range(1_000):
        limiter.take(f"key {i}")
        limiter.know(f"token {i}", "user")
    assert len(limiter) == 100


def test_every_answer_has_the_headers_that_keep_a_browser_safe(client: TestClient):
    for path in ("/", "/api/v1/me", "/nope", "/healthz", "/api/v1/sweeps/none"):
        headers = client.get(path).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-request-id"]
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers


def failing(services: Services) -> FastAPI:
    """The app with a route that fails as no route should."""
    app = make_app(services.settings, services=services)

    @app.get("/fails")
    def fails() -> None:
        raise RuntimeError(f"postgresql://ada:hunter2@db/fairway refused {TOKEN}")

    return app


def test_a_fault_of_ours_shows_an_id_and_nothing_of_the_inside(
    services: Services, caplog: pytest.LogCaptureFixture
):
    with TestClient(failing(services), base_url="http://127.0.0.1") as client:
        answer = client.get("/fails")

    refusal = answer.json()
    assert answer.status_code == 500
    assert refusal["detail"].endswith(answer.headers["x-request-id"])
    assert "hunter2" not in answer.text
    [logged] = [record for record in caplog.records if record.exc_info]
    line = Redacting().format(logged)
    assert "RuntimeError" in line
    assert answer.headers["x-request-id"] in line
    assert "hunter2" not in line
    assert TOKEN not in line


def test_the_access_log_says_who_asked_what_and_keeps_the_token_to_itself(
    services: Services, header: dict[str, str], caplog: pytest.LogCaptureFixture
):
    secret = header["Authorization"].removeprefix("Bearer ")
    with client_of(services, headers=header) as client, caplog.at_level(logging.INFO):
        answer = client.get(f"/api/v1/sweeps/{secret}?token={secret}")

    [record] = [each for each in caplog.records if each.name == "fairway.access"]
    line = Redacting().format(record)
    entry = json.loads(line)
    assert secret not in line
    assert secret not in answer.text
    assert entry["request"] == answer.headers["x-request-id"]
    assert (entry["method"], entry["status"], entry["user"]) == ("GET", 404, "ada")
    assert (entry["path"], entry["address"]) == ("/api/v1/sweeps/fwy_***", "127.0.0.1")
    assert entry["ms"] >= 0


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"token {TOKEN}.", "token fwy_***."),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("postgresql+psycopg://u:p%40s@h:5432/db", "postgresql+psycopg://u:***@h:5432/db"),
        ("https://u:p@h/x and http://h:80/y", "https://u:***@h/x and http://h:80/y"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
    ],
)
def test_secrets_are_replaced(text: str, shown: str):
    assert redact(text) == shown


def test_metrics_count_by_route_and_tell_the_state_of_the_queue(
    services: Services, client: TestClient
):
    client.post("/api/v1/sweeps", json=submission(name="counted"))
    for ref in ("one", "two", "three"):
        client.get(f"/api/v1/sweeps/{ref}")
    client.get("/what/ever")

    answer = client.get("/metrics")

    lines = dict(
        line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#")
    )
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    route = 'method="GET",route="/api/v1/sweeps/{ref}",status="404"'
    assert float(lines[f"fairway_http_requests_total{{{route}}}"]) >= 3
    assert 'fairway_sweeps{state="queued"}' in lines
    assert float(lines['fairway_sweeps{state="queued"}']) >= 1
    for name in ("gangs_held", "sse_clients", "notices_pending", "dispatcher_trouble"):
        assert float(lines[f"fairway_{name}"]) == 0
    assert not any("three" in name or "what/ever" in name for name in lines)


def test_metrics_of_two_services_do_not_mix(services: Services, tmp_path: Path):
    with (
        opened_service(tmp_path / "home") as other,
        client_of(other) as client,
    ):
        text = client.get("/metrics").text

    assert "fairway_http_requests_total{" not in text


def test_no_script_is_loaded_from_elsewhere_by_pages_of_documentation(client: TestClient):
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert client.get(path).status_code == 404
    assert client.get("/api/v1/openapi.json").status_code == 200
