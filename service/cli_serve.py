"""`fairway serve`, `fairway token`, `fairway quota`: running the service, and who may use it.

Tokens and quotas are written to the service's database directly, on its machine, whether or not
the service runs.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from service.cli_options import HOME, Home, Output, print_document, print_rows
from service.paths import Paths
from trainer.errors import UsageError

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from service.api.settings import Settings

EXTRA = ("alembic", "fastapi", "prometheus_client", "sqlalchemy", "uvicorn")

app = typer.Typer()
token_app = typer.Typer(help="Make, list and revoke tokens.", no_args_is_help=True)
quota_app = typer.Typer(help="Set and list what users may hold and spend.", no_args_is_help=True)

DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        envvar="FAIRWAY_DATABASE_URL",
        show_envvar=True,
        help="PostgreSQL for a team; default: SQLite in the home.",
    ),
]


@app.command()
def serve(
    home: Home = HOME,
    host: Annotated[str, typer.Option(help="Beyond loopback a token must exist.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 7878,
    database_url: DatabaseUrl = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            envvar="FAIRWAY_CLUSTER",
            help="A Ray dashboard, such as http://127.0.0.1:8265; default: run on this machine.",
        ),
    ] = None,
    gangs: Annotated[int, typer.Option(min=1, help="Gangs that may run at once.")] = 1,
    num_cpus: Annotated[
        int | None, typer.Option(min=1, help="CPUs that a sweep on this machine may use.")
    ] = None,
    tracking_uri: Annotated[
        str | None,
        typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow; default: a file in the home."),
    ] = None,
    root: Annotated[
        list[Path] | None, typer.Option(help="A folder from which sweeps may name files.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="A further name of the service, as its proxy has it.")
    ] = None,
    webhook: Annotated[
        list[str] | None,
        typer.Option(envvar="FAIRWAY_WEBHOOK", help="A URL to be told of new bests and ends."),
    ] = None,
    webhook_secret_file: Annotated[
        Path | None, typer.Option(help="A file with the secret that signs what is told.")
    ] = None,
    requests_per_second: Annotated[
        float, typer.Option(min=1.0, help="What one user may ask for on the long run.")
    ] = 50.0,
) -> None:
    """Run the service: a queue of sweeps over HTTP. Sweeps that run go on when it ends."""
    _require_extra()
    from service.api.settings import Settings

    settings = Settings(
        home=home,
        host=host,
        port=port,
        database_url=database_url,
        cluster=cluster,
        slots=gangs,
        num_cpus=num_cpus,
        tracking_uri=tracking_uri,
        roots=tuple(_folder(path) for path in root or ()),
        allowed_hosts=tuple(allowed_host or ()),
        webhooks=tuple(_url(url) for url in webhook or ()),
        webhook_secret=_secret(webhook_secret_file),
        requests_per_second=requests_per_second,
        burst=max(200, round(4 * requests_per_second)),
    )
    _serve(settings)


def _serve(settings: "Settings") -> None:
    from service.api.app import make_app
    from service.api.lifespan import Server, address_of, listen, opened, working
    from service.api.redaction import log_to_stderr

    with listen(settings.host, settings.port) as listener, opened(settings) as services:
        log_to_stderr()
        server = Server(make_app(settings, services=services), services)
        with working(services):
            _say(f"fairway listens on {address_of(listener)}, home {settings.home}")
            _say(_who_may(settings, had_token=bool(services.tokens.list())))
            server.run(sockets=[listener])
    _say("fairway has ended; sweeps that run go on, and the next service takes them up")


def _who_may(settings: "Settings", *, had_token: bool) -> str:
    create = f"`fairway token create NAME --role submitter --home {settings.home}`"
    if had_token:
        return f"a token is asked for; {create} makes one"
    if not settings.is_private:
        return f"a token is asked for and none exists; {create} makes one"
    return f"everybody on this machine is its admin, until {create} makes the first token"


@token_app.command("create")
def create_token(
    user: Annotated[str, typer.Argument(help="Whose token it is.")],
    role: Annotated[
        Literal["reader", "submitter", "admin"], typer.Option(help="What it opens.")
    ] = "submitter",
    days: Annotated[
        float | None, typer.Option(min=0.0, help="How long it is good for; default: for ever.")
    ] = None,
    note: Annotated[str, typer.Option(help="What it is for.")] = "",
    home: Home = HOME,
    database_url: DatabaseUrl = None,
) -> None:
    """Make a token and print it: this once, it is kept as a hash only."""
    with _database(home, database_url) as engine:
        from service.queue.queue import Queue
        from service.queue.records import Role
        from service.queue.tokens import Tokens

        expires_at = None if days is None else time.time() + days * 86_400
        record, token = Tokens(engine).create(user, Role(role), expires_at, note)
        Queue(engine).audit("local", "token create", f"{record.id} {user} {role}", "done")
    sys.stdout.write(f"{token}\n")
    _say(f"token {record.id} of {user}, {role}; set FAIRWAY_TOKEN to it, it is not shown again")


@token_app.command("ls")
def list_tokens(
    home: Home = HOME, database_url: DatabaseUrl = None, output: Output = "table"
) -> None:
    """List the tokens, without themselves."""
    with _database(home, database_url) as engine:
        from service.queue.tokens import Tokens

        records = Tokens(engine).list()
    rows: list[dict[str, Any]] = [
        {
            "id": record.id,
            "user": record.user,
            "role": str(record.role),
            "created": _day(record.created_at),
            "expires": _day(record.expires_at),
            "active": record.is_active(time.time()),
            "note": record.note,
        }
        for record in records
    ]
    _show(rows, output, "no tokens; `fairway token create` makes one")


@token_app.command("revoke")
def revoke_token(
    token_id: Annotated[int, typer.Argument(metavar="ID", help="As `fairway token ls` shows it.")],
    home: Home = HOME,
    database_url: DatabaseUrl = None,
) -> None:
    """Let a token open nothing any more, within a second; streams that it opened end within 15."""
    with _database(home, database_url) as engine:
        from service.queue.queue import Queue
        from service.queue.tokens import Tokens

        record = Tokens(engine).revoke(token_id)
        Queue(engine).audit("local", "token revoke", f"{record.id} {record.user}", "done")
    _say(f"token {record.id} of {record.user} opens nothing any more")


@quota_app.command("set")
def set_quota(
    user: Annotated[str, typer.Argument(help="Whose quota it is.")],
    gangs: Annotated[int | None, typer.Option(min=0, help="Held at once.")] = None,
    gpu_hours: Annotated[float | None, typer.Option(min=0.0, help="Spent in the window.")] = None,
    max_priority: Annotated[int, typer.Option(help="The highest that it may ask for.")] = 10,
    window_days: Annotated[float, typer.Option(help="How far back spending counts.")] = 30.0,
    home: Home = HOME,
    database_url: DatabaseUrl = None,
) -> None:
    """Set what a user may hold and spend, in place of what was set; left out: no limit."""
    with _database(home, database_url) as engine:
        from service.queue.queue import Queue
        from service.queue.quotas import Quotas
        from service.queue.records import Quota

        quota = Quota(user, gangs, gpu_hours, window_days, max_priority)
        Quotas(engine).put(quota)
        Queue(engine).audit("local", "quota set", user, "done")
    _say(f"quota of {user} set")


@quota_app.command("ls")
def list_quotas(
    home: Home = HOME, database_url: DatabaseUrl = None, output: Output = "table"
) -> None:
    """List the quotas that are set, and what is held and spent."""
    with _database(home, database_url) as engine:
        from service.queue.queue import Queue
        from service.queue.quotas import Quotas

        quotas, usage = Quotas(engine).list(), Queue(engine).usage(time.time())
    rows: list[dict[str, Any]] = []
    for quota in quotas:
        gangs, seconds = usage.get(quota.user, (0, 0.0))
        rows.append(
            {
                "user": quota.user,
                "max_gangs": quota.max_gangs,
                "gangs_held": gangs,
                "gpu_hours": quota.gpu_hours,
                "gpu_hours_used": round(seconds / 3_600, 3),
                "window_days": quota.window_days,
                "max_priority": quota.max_priority,
            }
        )
    _show(rows, output, "no quotas; `fairway quota set` sets one")


@contextmanager
def _database(home: Path, url: str | None) -> Iterator["Engine"]:
    """The service's database, closed at the end."""
    _require_extra()
    from service.queue.database import default_url, open_database

    engine = open_database(url or default_url(Paths(home)))
    try:
        yield engine
    finally:
        engine.dispose()


def _require_extra() -> None:
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"the service needs {', '.join(missing)}; install them with `pip install "
            "fairway[serve]`"
        )


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise UsageError(f"--root {path}: no such folder")
    return path.absolute()


def _url(url: str) -> str:
    if not url.startswith(("https://", "http://")):
        raise UsageError(f"--webhook {url!r}: write an address that begins with https://")
    return url


def _secret(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        secret = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--webhook-secret-file {path}: not a readable text file") from error
    if not secret:
        raise UsageError(f"--webhook-secret-file {path}: empty")
    return secret


def _show(rows: list[dict[str, Any]], output: Literal["table", "json", "yaml"], none: str) -> None:
    if rows:
        print_rows(rows, output)
    elif output == "table":
        _say(none)
    else:
        print_document(rows, output)


def _day(at: float | None) -> str:
    return "never" if at is None else time.strftime("%Y-%m-%d", time.gmtime(at))


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
