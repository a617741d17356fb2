"""One service on one home, from its lock to its end: what runs beside the routes.

The dispatcher and the notices are threads, the projection to MLflow is a process, which is started
again when it dies. Sweeps that run are jobs of their own: they neither notice that the service
goes nor that it comes back.
"""

import ipaddress
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.api.heartbeat import WatchedDispatcher
from service.api.planner import Planner
from service.api.services import Services
from service.api.settings import Settings
from service.api.views import Views
from service.jobs.runner import Runner
from service.notices import Notices
from service.paths import Paths
from service.queue.database import default_url, open_database
from service.queue.deliveries import Deliveries
from service.queue.ownership import owned
from service.queue.queue import Queue
from service.queue.quotas import Quotas
from service.queue.tokens import Tokens
from service.tails import Tails
from trainer.errors import UsageError
from trainer.runtime.environment import and_tracking_uri
from trainer.runtime.files import locked

logger = logging.getLogger(__name__)

GRACE_S = 5.0
"""How long answers under way may take once the service is told to end."""
MAX_CONNECTIONS = 2_000
KEPT_TAILS = 256
LONGEST_PAUSE_S = 60.0  # between two starts of a process that dies again and again


@contextmanager
def opened(settings: Settings, runner: Runner | None = None) -> Iterator[Services]:
    """The parts of a service on its home, nothing of it running yet; closed at the end. `runner`
    stands in for the one that the settings name.

    UsageError where another service holds the home, or where it would be open to a network.
    """
    paths = Paths(settings.home.resolve())
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(paths.home / "service.lock", wait=False))
        except BlockingIOError as error:
            raise UsageError(
                f"{settings.home}: another service runs on this home; stop it, or give --home"
            ) from error
        engine = open_database(settings.database_url or default_url(paths))
        stack.callback(engine.dispose)
        tokens = Tokens(engine)
        if not settings.is_loopback and not tokens.any_active():
            raise UsageError(
                f"--host {settings.host}: whoever reaches it could run sweeps; make a token first "
                "with `fairway token create NAME --role admin`"
            )
        confirm = stack.enter_context(owned(engine, paths.home))
        planner = Planner(paths, settings.roots)
        stack.callback(planner.close)
        queue, quotas, tails = Queue(engine), Quotas(engine), Tails(paths, keep=KEPT_TAILS)
        dispatcher = WatchedDispatcher(
            queue, quotas, runner or _runner(settings), paths, tails, settings.slots
        )
        dispatcher.confirm = confirm
        yield Services(
            settings=settings,
            paths=paths,
            engine=engine,
            queue=queue,
            tokens=tokens,
            quotas=quotas,
            deliveries=Deliveries(engine),
            tails=tails,
            views=Views(tails, paths),
            planner=planner,
            dispatcher=dispatcher,
        )


def _runner(settings: Settings) -> Runner:
    if settings.cluster is None:
        from service.jobs.local import LocalRunner

        return LocalRunner(settings.num_cpus)
    from service.jobs.ray_jobs import RayJobRunner

    return RayJobRunner(settings.cluster)


@contextmanager
def working(services: Services) -> Iterator[None]:
    """Dispatch, project and notify for as long as the block lasts."""
    stop, settings = services.stopping, services.settings
    notices = Notices(
        services.paths,
        services.queue,
        services.deliveries,
        services.tails,
        settings.webhooks,
        settings.webhook_secret,
    )
    tasks: dict[str, Callable[[], None]] = {
        "notices": lambda: notices.run_forever(stop),
        "outbox": lambda: keep_running(
            _outbox(services), stop, and_tracking_uri(settings.tracking_uri)
        ),
    }
    dispatcher = services.dispatcher
    if dispatcher is not None:
        tasks["dispatcher"] = lambda: dispatcher.run_forever(stop)
    services.planner.warm_up()
    threads = [threading.Thread(target=task, name=name) for name, task in tasks.items()]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _outbox(services: Services) -> list[str]:
    words = [sys.executable, "-m", "service.outbox", "--home", str(services.paths.home)]
    uri = ["--uri-from-environment"] if services.settings.tracking_uri else []
    return [*words, "--parent-pid", str(os.getpid()), *uri]


def keep_running(
    command: list[str], stop: threading.Event, variables: Mapping[str, str] | None = None
) -> None:
    """Run a process, again when it has died, later each time; end it when told to stop. It gets
    these variables, else ours."""
    pause_s = 1.0
    while not stop.is_set():
        began = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=Path(__file__).parent.parent.parent,
            env=variables,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us, who then end it
        )
        while process.poll() is None and not stop.wait(0.5):
            pass
        if process.poll() is None:
            _end(process)
            return
        pause_s = 1.0 if time.monotonic() - began > LONGEST_PAUSE_S else pause_s * 2
        logger.warning("the outbox ended with %s and is started again", process.returncode)
        stop.wait(min(pause_s, LONGEST_PAUSE_S))


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def listen(host: str, port: int) -> socket.socket:
    """Take a port, 0 for any that is free; UsageError where it cannot be had."""
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server((host, port), family=family, backlog=1024)
        # Connections inherit it; without, an answer in two pieces waits 40 ms for the client's ACK.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        raise UsageError(
            f"{host}:{port} cannot be listened on ({error.strerror}); choose another --port"
        ) from error


def address_of(listener: socket.socket) -> str:
    """The URL at which a socket is reached from here."""
    host, port = listener.getsockname()[:2]
    ip = ipaddress.ip_address(host)
    return f"http://[{host}]:{port}" if ip.version == 6 else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn that leaves by the front door: a signal lets what is open finish, a second one cuts
    it, and neither is raised again afterwards."""

    def __init__(self, app: FastAPI, services: Services) -> None:
        settings = services.settings
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,  # ours says who, and hides what it must
                server_header=False,
                lifespan="off",
                ws="none",
                # A proxy on this machine tells for whom it asks.
                proxy_headers=settings.is_loopback,
                forwarded_allow_ips="127.0.0.1,::1",
                limit_concurrency=MAX_CONNECTIONS,
                timeout_graceful_shutdown=int(GRACE_S),
            )
        )
        self._stopping = services.stopping

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        self._stopping.set()
