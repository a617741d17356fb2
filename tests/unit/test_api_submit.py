"""Submitting, validating and controlling sweeps over HTTP, and what hostile requests get."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.api.services import Services
from tests.serving import client_of, home_with, opened_service, served, submission
from trainer.data.shards import Dataset

PROBLEM = {"type", "title", "status", "detail", "instance"}


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset) -> Iterator[Services]:
    home = home_with(tmp_path_factory.mktemp("submit"), tiny_dataset)
    with opened_service(home, requests_per_second=10_000, burst=10_000) as made:
        yield made


@pytest.fixture(scope="module")
def client(services: Services) -> Iterator[TestClient]:
    with client_of(services) as made:
        yield made


def test_a_submission_is_queued_and_told_where(client: TestClient, services: Services):
    answer = client.post("/api/v1/sweeps", json={**submission(name="first"), "priority": 3})

    sweep = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/api/v1/sweeps/{sweep['id']}"
    assert (sweep["state"], sweep["owner"], sweep["priority"]) == ("queued", "local", 3)
    assert sweep["plan"]["trainings"] == 2
    assert client.get(answer.headers["location"]).json() == sweep
    record = services.queue.get(sweep["id"])
    bundle = services.paths.submissions / record.bundle
    assert (bundle / "micro.yaml").is_file()


def test_the_same_again_is_found_and_not_made(client: TestClient, services: Services):
    first = client.post("/api/v1/sweeps", json=submission(name="again"))
    again = client.post("/api/v1/sweeps", json=submission(name="again"))

    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    assert len(services.queue.page(name="again").items) == 1


def test_one_key_sent_by_many_at_once_makes_one_sweep(services: Services):
    answers: list[tuple[int, str]] = []
    with served(services) as client:

        def send() -> None:
            answer = client.post(
                "/api/v1/sweeps",
                json=submission(name="crowd"),
                headers={"Idempotency-Key": "k-1"},
            )
            answers.append((answer.status_code, answer.json()["id"]))

        threads = [threading.Thread(target=send) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert sorted(status for status, _ in answers) == [200] * 11 + [201]
    assert len({sweep for _, sweep in answers}) == 1


def test_a_key_that_was_used_for_something_else_is_a_conflict(client: TestClient):
    headers = {"Idempotency-Key": "k-2"}
    client.post("/api/v1/sweeps", json=submission(name="keyed"), headers=headers)

    answer = client.post("/api/v1/sweeps", json=submission(name="other"), headers=headers)

    assert answer.status_code == 409
    assert "k-2" in answer.json()["detail"]


def test_a_key_that_is_known_is_answered_without_planning_again(
    client: TestClient, services: Services
):
    headers = {"Idempotency-Key": "k-3"}
    first = client.post("/api/v1/sweeps", json=submission(name="once"), headers=headers)
    data = services.paths.home / "data"
    data.rename(services.paths.home / "away")  # without it nothing can be planned
    try:
        again = client.post("/api/v1/sweeps", json=submission(name="once"), headers=headers)
    finally:
        (services.paths.home / "away").rename(data)

    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()


def test_validating_tells_the_plan_and_queues_nothing(client: TestClient, services: Services):
    body = submission(name="looked-at")
    looked = client.post("/api/v1/sweeps:validate", json=body).json()

    assert not looked["known"]
    assert looked["usd"] is None
    assert not services.queue.page(name="looked-at").items

    made = client.post("/api/v1/sweeps", json=body).json()

    assert made["id"] == looked["sweep_id"]
    assert made["plan"] == looked["plan"]
    assert client.post("/api/v1/sweeps:validate", json=body).json()["known"]


def test_the_verbs_do_what_they_say_and_once_is_as_good_as_twice(client: TestClient):
    client.post("/api/v1/sweeps", json=submission(name="asked"))

    def ask(verb: str) -> tuple[int, str | None]:
        answer = client.post(f"/api/v1/sweeps/asked:{verb}")
        return answer.status_code, answer.json().get("state")

    assert ask("pause") == (200, "paused")
    assert ask("pause") == (200, "paused")
    assert ask("resume") == (200, "queued")
    assert ask("stop") == (200, "stopped")
    assert ask("resume") == (200, "queued")
    assert ask("cancel") == (200, "cancelled")
    assert ask("stop")[0] == 409


@pytest.mark.parametrize("ref", ["none", "%00", "..", "a%2Fb", "%F0%9F%98%80", "x" * 3_000, "%ff"])
@pytest.mark.parametrize("verb", ["pause", "resume", "stop", "cancel"])
def test_a_verb_on_what_is_not_there_is_a_404(client: TestClient, ref: str, verb: str):
    answer = client.post(f"/api/v1/sweeps/{ref}:{verb}")

    assert answer.status_code == 404
    assert set(answer.json()) == PROBLEM


def test_the_path_of_a_verb_is_no_sweep_and_an_unknown_verb_no_route(client: TestClient):
    shown = client.get("/api/v1/sweeps/micro:pause")

    assert (shown.status_code, shown.headers["allow"]) == (405, "POST")
    assert client.post("/api/v1/sweeps/micro:frob").status_code == 404
    assert client.delete("/api/v1/sweeps/micro").status_code == 405


DEEP = "[" * 100_000
GOOD = submission(name="good")


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 422),
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b"\x00", 400),
        (DEEP.encode(), 400),
        (b'{"sweep": ' + b"9" * 100_000 + b"}", 400),
        (b'{"sweep": 1e999}', 422),
        (b"null", 422),
        (b"[]", 422),
        (b'"text"', 422),
        (b"NaN", 422),
        (json.dumps({"sweep": DEEP}), 422),
        (json.dumps({"sweep": "a: &x [*x, *x]"}), 422),
        (json.dumps({"sweep": "\x00"}), 422),
        (b'{"sweep": "a: \\ud800"}', 422),
        (b'{"sweep": "a", "\\ud800": 1}', 422),
        (b'{"sweep": "a", "files": {"\\ud800.yaml": "b"}}', 422),
        (json.dumps({"sweep": None}), 422),
        (json.dumps({**GOOD, "priority": 10**30}), 422),
        (json.dumps({**GOOD, "priority": 1.5}), 422),
        (json.dumps({**GOOD, "priority": "1"}), 422),
        (json.dumps({**GOOD, "priority": True}), 422),
        (json.dumps({**GOOD, "more": 1}), 422),
        (json.dumps({**GOOD, "files": {"../x.yaml": "a: 1"}}), 422),
        (json.dumps({**GOOD, "files": {f"f{i}.yaml": "" for i in range(99)}}), 422),
        (json.dumps({**GOOD, "assignments": ["recipe=/etc/passwd"]}), 422),
        (json.dumps({**GOOD, "assignments": [["a"]]}), 422),
        (json.dumps({**GOOD, "sweep": "a: " + "9" * 10_000}), 422),
        (json.dumps({**GOOD, "sweep": "x" * 900_000}), 422),
    ],
)
@pytest.mark.parametrize("path", ["sweeps", "sweeps:validate"])
def test_a_hostile_body_is_refused_in_a_line(
    client: TestClient, services: Services, path: str, content: bytes | str, status: int
):
    answer = client.post(
        f"/api/v1/{path}", content=content, headers={"Content-Type": "application/json"}
    )

    refusal = answer.json()
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert set(refusal) == PROBLEM
    assert len(refusal["detail"].splitlines()) == 1
    assert len(refusal["detail"]) <= 2_000
    assert str(services.paths.home) not in answer.text
    assert "Traceback" not in answer.text


def test_a_fault_names_the_file_and_the_field_as_the_user_knows_them(client: TestClient):
    body = submission(limits={"max_concurent": 2})

    detail = client.post("/api/v1/sweeps", json=body).json()["detail"]

    assert detail == ("sweep.yaml: limits.max_concurent: unknown key; did you mean max_concurrent?")


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_a_key_has_a_sensible_length(client: TestClient, key: str):
    answer = client.post("/api/v1/sweeps", json=submission(), headers={"Idempotency-Key": key})

    assert answer.status_code == 422


def test_every_refusal_that_openapi_names_is_problem_json(client: TestClient):
    document: dict[str, Any] = client.get("/api/v1/openapi.json").json()

    problems = {
        (path, status): list(answer["content"])
        for path, methods in document["paths"].items()
        for method in methods.values()
        for status, answer in method["responses"].items()
        if int(status) >= 400 and not path.endswith("/readyz")
    }
    assert problems
    assert all(media == ["application/problem+json"] for media in problems.values()), problems
    assert "Problem" in document["components"]["schemas"]
    submit = document["paths"]["/api/v1/sweeps"]["post"]["responses"]
    named = {"200", "201", "400", "401", "403", "409", "413", "415", "422", "429", "503"}
    assert named <= set(submit)
