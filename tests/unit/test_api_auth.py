"""Who may call the service, and what each role may do."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from service.api.lifespan import opened
from service.api.services import Services
from service.api.settings import Settings, is_loopback
from service.queue.records import Quota, Role
from tests.serving import client_of, home_with, opened_service, submission, token
from trainer.data.shards import Dataset
from trainer.errors import UsageError


@pytest.fixture
def services(tmp_path: Path, tiny_dataset: Dataset) -> Iterator[Services]:
    with opened_service(home_with(tmp_path, tiny_dataset)) as made:
        yield made


@pytest.fixture(scope="module")
def team(
    tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset
) -> Iterator[tuple[Services, dict[str, dict[str, str]]]]:
    """A service with a user of each role and two submitters, by their headers."""
    folder = tmp_path_factory.mktemp("team")
    with opened_service(home_with(folder, tiny_dataset)) as made:
        roles = {"rita": "reader", "sam": "submitter", "sue": "submitter", "ada": "admin"}
        yield made, {user: token(made, user, role) for user, role in roles.items()}


def test_without_any_token_everybody_on_this_machine_is_admin(services: Services):
    with client_of(services) as client:
        me = client.get("/api/v1/me").json()

    assert me == {"user": "local", "role": "admin", "is_open": True}


def test_the_first_token_closes_the_service_at_once(services: Services):
    with client_of(services) as client:
        assert client.get("/api/v1/me").status_code == 200

        header = token(services, "ada", "admin")

        refused = client.get("/api/v1/me")
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert "fairway token create" in refused.json()["detail"]
        me = client.get("/api/v1/me", headers=header).json()
        assert me == {"user": "ada", "role": "admin", "is_open": False}


def test_a_service_whose_tokens_have_all_run_out_or_are_revoked_stays_closed(services: Services):
    record, secret = services.tokens.create("ada", Role.ADMIN)
    with pytest.MonkeyPatch.context() as long_ago:
        long_ago.setattr("service.queue.tokens.time", SimpleNamespace(time=lambda: 1_000.0))
        services.tokens.create("bob", Role.ADMIN, expires_at=1_010.0)
    services.tokens.revoke(record.id)

    with client_of(services) as client:
        assert not services.tokens.any_active()
        assert client.get("/api/v1/me").status_code == 401
        header = {"Authorization": f"Bearer {secret}"}
        assert client.get("/api/v1/me", headers=header).status_code == 401


def test_a_service_behind_a_proxy_is_never_open(tmp_path: Path):
    with (
        opened_service(tmp_path / "home", allowed_hosts=("fairway.example",)) as services,
        client_of(services, base_url="http://fairway.example") as client,
    ):
        assert client.get("/api/v1/me").status_code == 401


@pytest.mark.parametrize(
    "name", ["X-Forwarded-For", "Forwarded", "x-forwarded-proto", "X-Real-IP", "Via"]
)
def test_what_a_proxy_passes_on_is_nobodys_admin(services: Services, name: str):
    with client_of(services) as client:
        passed_on = client.get("/api/v1/me", headers={name: "127.0.0.1"})

        assert passed_on.status_code == 401
        assert client.get("/api/v1/me").status_code == 200


def test_another_machine_is_nobodys_admin(services: Services):
    with client_of(services, client=("192.0.2.7", 50_000)) as client:
        assert client.get("/api/v1/me").status_code == 401


def test_a_token_that_was_made_and_revoked_between_two_requests_closes_the_service(
    services: Services,
):
    with client_of(services) as client:
        assert client.get("/api/v1/me").status_code == 200
        record, _ = services.tokens.create("ada", Role.ADMIN)
        services.tokens.revoke(record.id)

        assert client.get("/api/v1/me").status_code == 401


def test_a_revoked_token_opens_nothing_within_a_second_or_two(services: Services):
    record, secret = services.tokens.create("ada", Role.ADMIN)
    header = {"Authorization": f"Bearer {secret}"}
    with client_of(services) as client:
        assert client.get("/api/v1/me", headers=header).status_code == 200
        services.tokens.revoke(record.id)
        time.sleep(1.5)

        assert client.get("/api/v1/me", headers=header).status_code == 401


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Bearer nonsense", "Bearer fwy_" + "x" * 43, "Basic YTpi",
     "Bearer fwy_" + "x" * 5_000, "fwy_" + "x" * 43, "Bearer fwy_\xff" + "x" * 42],
)  # fmt: skip
def test_what_is_no_token_is_a_401(team, header: str):
    services, _ = team
    with client_of(services) as client:
        answer = client.get("/api/v1/sweeps", headers={"Authorization": header.encode("latin-1")})

    assert answer.status_code == 401
    assert answer.headers["content-type"] == "application/problem+json"


READS = ["/sweeps", "/sweeps/micro", "/sweeps/micro/finals", "/me", "/quotas", "/metrics",
         "/events", "/sweeps/micro/report"]  # fmt: skip


@pytest.mark.parametrize("path", READS)
def test_every_read_asks_for_a_token(team, path: str):
    services, _ = team
    with client_of(services) as client:
        assert client.get(f"/api/v1{path}").status_code == 401


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/api/v1/healthz", "/api/v1/readyz"])
def test_probes_need_no_token(team, path: str):
    services, _ = team
    with client_of(services) as client:
        assert client.get(path).status_code in (200, 503)


def test_a_service_whose_dispatcher_hangs_is_not_ready(services: Services):
    dispatcher = services.dispatcher
    assert dispatcher is not None
    with client_of(services) as client:
        dispatcher.ticked_at = time.time() - 20
        in_time = client.get("/readyz").json()["jobs"]
        dispatcher.ticked_at = time.time() - 70
        answer = client.get("/readyz")

    assert in_time["ok"]
    assert answer.status_code == 503
    assert "has not come through" in answer.json()["jobs"]["detail"]


def test_a_database_out_of_reach_is_told_without_its_address(
    services: Services, caplog: pytest.LogCaptureFixture
):
    with client_of(services) as client:
        database = services.paths.home / "service.db"
        services.engine.dispose()
        for file in services.paths.home.glob("service.db*"):
            file.unlink()
        database.mkdir()
        answer = client.get("/api/v1/sweeps")

    assert answer.status_code == 503
    assert answer.json()["detail"] == "the database is out of reach; try again later"
    assert "service.db" in caplog.text


def test_roles_may_do_what_they_should_and_no_more(team):
    services, headers = team
    with client_of(services) as client:

        def post(path: str, user: str, **options) -> int:
            return client.post(f"/api/v1{path}", headers=headers[user], **options).status_code

        body = submission(name="roles")
        assert post("/sweeps", "rita", json=body) == 403
        assert post("/sweeps:validate", "rita", json=body) == 403
        assert post("/sweeps", "sam", json=body) == 201
        assert post("/sweeps/roles:pause", "rita") == 403
        assert post("/sweeps/roles:cancel", "rita") == 403
        assert post("/sweeps/roles:cancel", "sue") == 403
        assert client.get("/api/v1/sweeps/roles", headers=headers["rita"]).status_code == 200
        assert services.queue.find("roles").state == "queued"
        assert post("/sweeps/roles:pause", "sam") == 200
        assert post("/sweeps/roles:cancel", "ada") == 200


def test_an_admin_sees_everybodys_quota_and_others_their_own(team):
    services, headers = team
    services.quotas.put(Quota("sam", max_gangs=2, gpu_hours=10.0))
    services.quotas.put(Quota("sue", max_gangs=1))
    with client_of(services) as client:
        own = client.get("/api/v1/quotas", headers=headers["sam"]).json()
        everybodys = client.get("/api/v1/quotas", headers=headers["ada"]).json()

    assert [(row["user"], row["max_gangs"], row["gpu_hours"]) for row in own] == [("sam", 2, 10.0)]
    assert {"sam", "sue"} <= {row["user"] for row in everybodys}


def test_a_priority_over_the_quota_is_refused(team):
    services, headers = team
    services.quotas.put(Quota("sue", max_priority=3))
    with client_of(services) as client:
        body = {**submission(name="pushed"), "priority": 4}
        answer = client.post("/api/v1/sweeps", json=body, headers=headers["sue"])

    assert answer.status_code == 403
    assert "priority=4" in answer.json()["detail"]


def test_the_audit_log_has_what_was_done_and_what_was_refused(team):
    services, headers = team
    with client_of(services) as client:
        client.post("/api/v1/sweeps", json=submission(name="noted"), headers=headers["sam"])
        client.post("/api/v1/sweeps", json={"sweep": "a: ["}, headers=headers["sam"])
        client.post("/api/v1/sweeps/noted:cancel", headers=headers["sue"])
        client.post("/api/v1/sweeps/noted:cancel", headers=headers["rita"])
        client.post("/api/v1/sweeps/noted:cancel")
        client.get("/api/v1/sweeps", headers=headers["sam"])

    noted = services.queue.find("noted").sweep_id
    log = [
        (row["user"], row["action"], row["subject"], row["outcome"].partition(":")[0])
        for row in services.queue.audit_log(limit=5)
    ]
    assert log == [
        ("-", "POST", "/api/v1/sweeps/noted:cancel", "401"),
        ("rita", "POST", "/api/v1/sweeps/noted:cancel", "403"),
        ("sue", "cancel", noted, "403"),
        ("sam", "submit", "-", "422"),
        ("sam", "submit", noted, "done"),
    ]


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "::", "fairway.example"])
def test_a_bind_beyond_loopback_needs_a_token_first(tmp_path: Path, host: str):
    settings = Settings(home=tmp_path / "home", host=host)

    with pytest.raises(UsageError, match="fairway token create"), opened(settings):
        pass


def test_a_bind_beyond_loopback_with_a_token_asks_for_it(tmp_path: Path):
    with opened_service(tmp_path / "home") as services:
        header = token(services, "ada", "admin")
    with (
        opened_service(tmp_path / "home", host="0.0.0.0") as services,
        client_of(services) as client,
    ):
        assert client.get("/api/v1/me").status_code == 401
        assert client.get("/api/v1/me", headers=header).status_code == 200


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("localhost", True), ("::1", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("localhost.example", False),
     ("127.0.0.1.example", False), ("", False)],
)  # fmt: skip
def test_loopback_is_told_from_what_only_looks_like_it(host: str, expected: bool):
    assert is_loopback(host) is expected


def test_two_services_cannot_share_a_home(tmp_path: Path):
    settings = Settings(home=tmp_path / "home")
    with (
        opened(settings),
        pytest.raises(UsageError, match="another service runs on this home"),
        opened(settings),
    ):
        pass
