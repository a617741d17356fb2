"""The client's own rules: where a token may go, what an address is, what a refusal becomes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from service.client import INFEASIBLE, Client
from trainer.errors import BackendError, InfeasibleError, UsageError


@pytest.mark.parametrize("server", ["http://fairway.example", "HTTP://10.0.0.3:7878"])
def test_a_token_never_travels_in_clear_beyond_this_machine(server: str) -> None:
    with pytest.raises(UsageError, match="the token would travel in clear; use https"):
        Client(server, "fwy_secret")


@pytest.mark.parametrize("token", ["fwy_secret\nx", "fwy_…", "fwy_ secret"])
def test_a_token_with_a_slip_in_it_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(UsageError, match="holds a space") as caught:
        Client("https://fairway.example", token)

    assert "fwy_" not in str(caught.value)


@pytest.mark.parametrize("server", ["fairway.example:7878", "ftp://x", "https://", "http://[::"])
def test_what_is_no_address_of_a_service_is_told_before_anything_is_sent(server: str) -> None:
    with pytest.raises(UsageError, match="is not the address of a service"):
        Client(server)


@pytest.mark.parametrize("ref", ["", "../me", "a/b", "a b", "a:cancel"])
def test_what_can_be_no_sweep_is_not_asked_for(ref: str) -> None:
    with Client() as client, pytest.raises(UsageError, match="is no sweep"):
        client.sweep(ref)


def test_a_redirect_is_no_answer() -> None:
    moved = {"Location": "https://fairway.example/"}

    with answering(301, "", moved) as (client, _), pytest.raises(UsageError, match="has moved to"):
        client.report("some")


def test_an_infeasible_best_is_told_as_the_error_that_it_is_at_home() -> None:
    problem = f'{{"type": "{INFEASIBLE}", "detail": "no final is feasible"}}'
    with answering(404, problem) as (client, _), pytest.raises(InfeasibleError, match="no final"):
        client.best("some")


def test_what_fails_for_a_moment_is_asked_again_under_the_same_key() -> None:
    busy = answering(503, '{"detail": "busy"}', {"Retry-After": "0"})

    with busy as (client, keys), pytest.raises(BackendError, match="busy; try again later"):
        client.submit("quickstart")

    assert len(keys) == 5
    assert len(set(keys)) == 1


@contextmanager
def answering(
    status: int, body: str, headers: dict[str, str] | None = None
) -> Iterator[tuple[Client, list[str]]]:
    """A client of a server that always answers so, and the idempotency keys that came."""
    keys: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            keys.append(self.headers.get("Idempotency-Key", ""))
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with Client(f"http://127.0.0.1:{server.server_port}", timeout_s=240) as client:
            yield client, keys
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
