"""What the API shows of sweeps, asked as a client asks."""

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.api import page
from service.api.logs import read_piece
from service.outbox_health import OutboxHealth
from service.queue.records import Role
from service.states import State
from tests.api_home import Home, advance, filled
from tests.serving import client_of, opened_service
from trainer.runtime.files import write_bytes, write_json, write_text

ENOUGH = {"requests_per_second": 1e6, "burst": 1_000_000}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with opened_service(tmp_path / "home", **ENOUGH) as services:
        yield filled(services)


@pytest.fixture
def client(home: Home) -> Iterator[TestClient]:
    with client_of(home.services) as client:
        yield client


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A home that no test changes."""
    with opened_service(tmp_path_factory.mktemp("shared") / "home", **ENOUGH) as services:
        yield filled(services)


@pytest.fixture(scope="module")
def reader(shared: Home) -> Iterator[TestClient]:
    """A client of it."""
    with client_of(shared.services) as client:
        yield client


def get(client: TestClient, path: str, **params: Any) -> Any:
    answer = client.get(f"/api/v1{path}", params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(client: TestClient, path: str, status: int, **params: Any) -> str:
    """Ask for what is to be refused; the one line that says why."""
    answer = client.get(f"/api/v1{path}", params=params)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    detail = answer.json()["detail"]
    assert "\n" not in detail
    return detail


def test_the_list_has_every_sweep_once_the_newest_first(shared: Home, reader: TestClient) -> None:
    seen, cursor = [], {}
    while True:
        found = get(reader, "/sweeps", limit=3, **cursor)
        seen += [sweep["id"] for sweep in found["items"]]
        if found["next_cursor"] is None:
            break
        cursor = {"cursor": found["next_cursor"]}

    assert seen == [shared.queued, shared.running, shared.over, shared.done]


def test_the_list_can_be_narrowed(shared: Home, reader: TestClient) -> None:
    states = get(reader, "/sweeps", state=["running", "queued"])["items"]
    named = get(reader, "/sweeps", name="warmdown", owner="ann")["items"]
    nobody = get(reader, "/sweeps", owner="ben")["items"]

    assert {sweep["id"] for sweep in states} == {shared.running, shared.queued}
    assert [sweep["id"] for sweep in named] == [shared.running, shared.done]
    assert nobody == []


def test_a_sweep_is_found_by_id_by_a_start_of_it_and_by_name(
    shared: Home, reader: TestClient
) -> None:
    assert get(reader, f"/sweeps/{shared.done}")["id"] == shared.done
    assert get(reader, "/sweeps/toolarge-7")["id"] == shared.over
    assert get(reader, "/sweeps/warmdown")["id"] == shared.running  # the newest of that name


def test_what_fits_no_sweep_or_several_is_refused(reader: TestClient) -> None:
    assert "no sweep 'nope'" in refused(reader, "/sweeps/nope", 404)
    assert "fits 2 sweeps" in refused(reader, "/sweeps/warmdown-", 422)


def test_the_detail_follows_the_ledger(home: Home, client: TestClient) -> None:
    before = get(client, f"/sweeps/{home.running}")
    sweep = home.sweep(home.running)
    with sweep.open() as ledger:
        sweep.end(ledger, sweep.train_points()[0])

    after = get(client, f"/sweeps/{home.running}")

    assert before["status"]["trainings"]["running"] == 1
    assert after["status"]["trainings"] == {
        **before["status"]["trainings"],
        "running": 0,
        "done": 1,
    }


def damage(home: Home, sweep_id: str) -> None:
    """Break the second line of a sweep's ledger."""
    ledger = home.services.paths.sweep(sweep_id).ledger
    lines = ledger.read_bytes().splitlines(keepends=True)
    write_bytes(ledger, b"".join([lines[0], b"{}\n", *lines[2:]]))


def test_a_sweep_whose_ledger_is_damaged_is_shown_and_controlled(
    home: Home, client: TestClient
) -> None:
    damage(home, home.running)

    asked = client.post(f"/api/v1/sweeps/{home.running}:cancel")
    advance_blindly(home, home.running, "events.jsonl: line 2 is damaged")
    shown = get(client, f"/sweeps/{home.running}")

    assert (asked.status_code, asked.json()["want"]) == (200, "cancel")
    assert (shown["state"], shown["status"]) == ("failed", None)
    assert shown["reason"] == "events.jsonl: line 2 is damaged"


def advance_blindly(home: Home, sweep_id: str, reason: str) -> None:
    """End a sweep as failed without a look at its ledger."""
    queue = home.services.queue
    assert queue.advance(queue.get(sweep_id), state=State.FAILED, reason=reason)


def test_the_detail_links_to_mlflow_once_it_is_there(home: Home, client: TestClient) -> None:
    nowhere = get(client, f"/sweeps/{home.done}")["links"]
    tracking = home.services.paths.sweep(home.done).tracking
    write_text(tracking, '{"link": "http://m/#/a", "table_link": "http://m/#/b", "run_ids": {}}')

    found = get(client, f"/sweeps/{home.done}")["links"]

    assert nowhere == {"mlflow": None, "mlflow_table": None}
    assert found == {"mlflow": "http://m/#/a", "mlflow_table": "http://m/#/b"}


def test_finals_come_in_pages_and_by_state(shared: Home, reader: TestClient) -> None:
    first = get(reader, f"/sweeps/{shared.done}/finals", limit=3)
    second = get(reader, f"/sweeps/{shared.done}/finals", limit=3, cursor=first["next_cursor"])
    too_large = get(reader, f"/sweeps/{shared.over}/finals", state="infeasible")

    rows = [*first["items"], *second["items"]]
    assert len({row["final"] for row in rows}) == len(rows) == 4
    assert second["next_cursor"] is None
    assert len(too_large["items"]) == 4


def test_trainings_of_a_lost_sweep_are_lost(home: Home, client: TestClient) -> None:
    live = get(client, f"/sweeps/{home.running}/trainings")["items"]
    advance(home.services, home.running, State.LOST, "its job was lost 3 times")

    lost = get(client, f"/sweeps/{home.running}/trainings")["items"]
    tree = get(client, f"/sweeps/{home.running}/tree")

    assert [row["state"] for row in live] == ["running"]
    assert [row["state"] for row in lost] == ["lost"]
    assert [row["state"] for row in tree["trainings"]] == ["lost"]


def test_the_pareto_points_are_those_that_were_scored(shared: Home, reader: TestClient) -> None:
    found = get(reader, f"/sweeps/{shared.over}/pareto")

    assert found["cap_bytes"] == 16_000_000
    assert len(found["points"]) == 4
    assert not any(point["is_front"] for point in found["points"])


def test_the_best_is_named_with_its_run(home: Home, client: TestClient) -> None:
    first = get(client, f"/sweeps/{home.done}/finals", limit=1)["items"][0]["final"]
    write_text(home.services.paths.sweep(home.done).tracking, f'{{"run_ids": {{"{first}": "r7"}}}}')

    found = get(client, f"/sweeps/{home.done}/best")

    assert found["final"] == first
    assert found["mlflow_run_id"] == "r7"
    assert found["artifact"] == f"store/finals/{first}/artifact"


def test_without_a_feasible_final_the_nearest_miss_is_told(
    shared: Home, reader: TestClient
) -> None:
    answer = reader.get(f"/api/v1/sweeps/{shared.over}/best")

    assert answer.status_code == 404
    assert answer.json()["type"] == "urn:fairway:infeasible"
    assert "bytes over the cap" in answer.json()["detail"]


def test_the_report_is_one_page_that_cannot_reach_our_token(
    shared: Home, reader: TestClient
) -> None:
    answer = reader.get(f"/api/v1/sweeps/{shared.queued}/report")

    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["content-security-policy"].startswith("sandbox allow-scripts")
    assert "allow-same-origin" not in answer.headers["content-security-policy"]
    assert "</html>" in answer.text


def test_the_report_is_drawn_again_when_there_is_news_only(home: Home) -> None:
    views, record = home.services.views, home.services.queue.get(home.running)
    first = views.page(record)
    again = views.page(record)
    sweep = home.sweep(home.running)
    with sweep.open() as ledger:
        sweep.end(ledger, sweep.train_points()[0])

    newer = views.page(record)

    assert again is first
    assert newer is not first


def test_the_spec_is_the_submitted_one_until_the_sweep_runs(home: Home, client: TestClient) -> None:
    path = f"/api/v1/sweeps/{home.queued}/spec"
    submitted = client.get(path)
    write_text(home.services.paths.sweep(home.queued).spec, "name: later\nversion: 1\n")

    effective = client.get(path)

    assert submitted.text == "name: later\n"
    assert submitted.headers["content-type"].startswith("application/yaml")
    assert effective.text == "name: later\nversion: 1\n"


def test_a_log_is_read_piece_by_piece_to_its_end(home: Home, client: TestClient) -> None:
    text = "".join(f"wörd {number} – 漢字 🎉\n" for number in range(60))
    home.log(home.done, text)

    read, offset, pieces = "", 0, 0
    while True:
        part = get(client, f"/sweeps/{home.done}/logs", offset=offset, limit=17)
        read, offset, pieces = read + part["text"], part["next_offset"], pieces + 1
        if part["is_over"]:
            break

    assert read == text
    assert offset == len(text.encode())
    assert pieces > 60


def test_a_log_is_over_only_when_its_sweep_is(home: Home, client: TestClient) -> None:
    log = home.log(home.running, "one\n")
    first = get(client, f"/sweeps/{home.running}/logs")
    with log.open("a") as file:
        file.write("two\n")
    advance(home.services, home.running, State.SUCCEEDED)

    second = get(client, f"/sweeps/{home.running}/logs", offset=first["next_offset"])

    assert first == {"text": "one\n", "next_offset": 4, "is_over": False}
    assert second == {"text": "two\n", "next_offset": 8, "is_over": True}


def test_a_sweep_that_said_nothing_yet_has_an_empty_log(shared: Home, reader: TestClient) -> None:
    found = get(reader, f"/sweeps/{shared.queued}/logs")

    assert found == {"text": "", "next_offset": 0, "is_over": False}


def test_a_training_shows_its_curve(shared: Home, reader: TestClient) -> None:
    training = get(reader, f"/sweeps/{shared.running}/trainings")["items"][0]["id"]

    found = get(reader, f"/sweeps/{shared.running}/logs", source=training)

    assert '"train/loss"' in found["text"]


@pytest.mark.parametrize(
    "source", ["", "..", "../../service.db", "tracking", "/etc/passwd", "a\0b"]
)
def test_a_log_is_the_drivers_or_a_trainings_of_this_sweep(
    source: str, shared: Home, reader: TestClient
) -> None:
    assert "neither driver nor a training" in refused(
        reader, f"/sweeps/{shared.done}/logs", 404, source=source
    )


def test_a_training_of_another_sweep_is_no_source(shared: Home, reader: TestClient) -> None:
    # Both have trained the same point, so the other's second training is one that is new to it.
    other = get(reader, f"/sweeps/{shared.done}/trainings")["items"][1]["id"]

    refused(reader, f"/sweeps/{shared.running}/logs", 404, source=other)


def test_bytes_that_are_no_text_are_shown_as_such(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"ok \xff\xfe cut \xe6\xbc")

    going_on = read_piece(path, 0, 1_000, is_ended=False)
    ended = read_piece(path, 0, 1_000, is_ended=True)
    beyond = read_piece(path, 10_000, 1_000, is_ended=False)

    assert going_on == {"text": "ok �� cut ", "next_offset": 10, "is_over": False}
    assert ended == {"text": "ok �� cut �", "next_offset": 12, "is_over": True}
    assert beyond == {"text": "", "next_offset": 12, "is_over": False}


def test_compare_prints_what_the_command_line_does(shared: Home, reader: TestClient) -> None:
    answer = reader.post("/api/v1/compare", json={"sides": [shared.done, shared.done]})

    assert answer.status_code == 200, answer.text
    assert [side["name"] for side in answer.json()["sides"]] == [shared.done, shared.done]
    assert answer.json()["contrasts"][0]["gain_bpb"] == 0.0


def test_a_final_is_a_side_whatever_other_ledgers_are_damaged(
    home: Home, client: TestClient
) -> None:
    final = get(client, f"/sweeps/{home.done}/finals", limit=1)["items"][0]["final"]
    damage(home, home.over)  # which has finals of the same ids

    answer = client.post("/api/v1/compare", json={"sides": [final[:12], final]})

    assert answer.status_code == 200, answer.text
    assert answer.json()["contrasts"][0]["gain_bpb"] == 0.0


def test_comparisons_are_worked_out_one_at_a_time_and_of_few_sides(
    home: Home, client: TestClient
) -> None:
    pipe = home.services.paths.sweep("slow-000009").ledger
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)  # a ledger that takes long to read
    body = {"sides": [home.done, "abcdef012345"]}
    answers: list[int] = []

    def ask() -> None:
        answers.append(client.post("/api/v1/compare", json=body).status_code)

    first = threading.Thread(target=ask)
    first.start()
    writer = pipe.open("wb")  # opens once the first has begun to read
    busy = client.post("/api/v1/compare", json=body)
    writer.close()
    first.join()
    pipe.unlink()
    ask()

    assert (busy.status_code, int(busy.headers["retry-after"]) > 0) == (503, True)
    assert answers == [422, 422]  # there is no such final
    many = client.post("/api/v1/compare", json={"sides": [home.done] * 9})
    assert many.status_code == 422


@pytest.mark.parametrize(
    "side", ["../../etc/passwd", "/etc/passwd", "x.yaml", "x.yml", "", "a b", "nothing-here"]
)
def test_compare_reads_no_files_and_no_unknown_sweeps(
    side: str, shared: Home, reader: TestClient
) -> None:
    answer = reader.post("/api/v1/compare", json={"sides": [shared.done, side]})

    assert answer.status_code == 422
    assert str(shared.services.paths.home) not in answer.text


def test_an_answer_is_worked_out_once_for_each_state_of_the_ledger(home: Home) -> None:
    asked = []

    def question(view: Any, events: Any) -> int:
        asked.append(view.events)
        return view.events

    views = home.services.views
    counts = [views.ask(home.running, question) for _ in range(3)]
    sweep = home.sweep(home.running)
    with sweep.open() as ledger:
        sweep.end(ledger, sweep.train_points()[0])

    assert views.ask(home.running, question) == counts[0] + 1
    assert asked == [counts[0], counts[0] + 1]


def test_the_page_and_its_library_are_served_without_a_token(home: Home) -> None:
    home.services.tokens.create("ann", Role.READER)
    with client_of(home.services) as client:
        index = client.get("/")
        library = client.get("/ui/plotly.min.js", headers={"Accept-Encoding": "gzip"})
        known = client.get("/ui/plotly.min.js", headers={"If-None-Match": library.headers["etag"]})

    assert index.status_code == 200
    assert "<main" in index.text
    assert library.headers["content-encoding"] == "gzip"
    assert "max-age=604800" in library.headers["cache-control"]
    assert "plotly.js v" in library.text[:300]
    assert known.status_code == 304


def test_the_library_is_sent_plain_to_who_cannot_unpack_it(reader: TestClient) -> None:
    answer = reader.get("/ui/plotly.min.js", headers={"Accept-Encoding": "identity"})

    assert "content-encoding" not in answer.headers
    assert len(answer.content) > 1_000_000


@pytest.mark.parametrize(
    "name",
    [
        "nope.js",
        "..%2Fapi%2Fapp.py",
        "%2e%2e%2fcli.py",
        "__init__.py",
        ".",
        "a%00.js",
        "a" * 300 + ".js",
    ],
)
def test_the_page_has_only_its_own_files(name: str, reader: TestClient) -> None:
    answer = reader.get(f"/ui/{name}")

    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


def test_the_api_works_without_the_page(
    tmp_path: Path, reader: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "WEB", tmp_path / "nowhere")

    index = reader.get("/")

    assert index.status_code == 404
    assert "/api/v1" in index.json()["detail"]
    assert get(reader, "/sweeps")["items"]


def test_readyz_tells_how_far_mlflow_is_behind(home: Home, client: TestClient) -> None:
    refused = {"a-1": "it is damaged"}
    details: list[str] = []
    for lag in ({}, {"a-1": 4, "b-1": 8}):
        health = OutboxHealth(at=time.time(), lag_events=lag, refused=refused if lag else {})
        write_json(home.services.paths.outbox, asdict(health))
        details.append(client.get("/readyz").json()["tracking"]["detail"])

    assert details == ["in reach", "in reach, 12 events behind, 1 sweep refused"]
