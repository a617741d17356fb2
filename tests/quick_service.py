"""The whole service as a process, its sweeps done by `tests.quick_job`: to be killed at any moment.

    python -m tests.quick_service --home HOME --port N --gangs G

starts one for every line on its standard input, as a fork of itself so that nothing is imported
again, and prints its process id.
"""

import argparse
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

from service.api.app import make_app
from service.api.lifespan import Server, listen, opened
from service.api.settings import Settings
from service.jobs.dispatcher import Dispatcher
from service.jobs.local import LocalRunner

PROGRAM = (sys.executable, "-m", "tests.quick_job")


def main() -> None:
    """Fork a service for every line, until there is none."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--gangs", type=int, default=1)
    given = parser.parse_args()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead leave nothing behind
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            serve(given.home, given.port, given.gangs)
            os._exit(0)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


def serve(home: Path, port: int, gangs: int) -> None:
    """Serve until told to end."""
    settings = Settings(home=home, port=port, slots=gangs, burst=10_000)
    with listen(settings.host, settings.port) as listener, opened(settings) as services:
        runner = LocalRunner(program=PROGRAM)
        dispatcher = Dispatcher(
            services.queue,
            services.quotas,
            runner,
            services.paths,
            services.tails,
            settings.slots,
        )
        services = replace(services, dispatcher=dispatcher)
        server = Server(make_app(settings, services=services), services)
        beside = threading.Thread(target=dispatcher.run_forever, args=(services.stopping,))
        beside.start()
        try:
            server.run(sockets=[listener])
        finally:
            services.stopping.set()
            beside.join()


if __name__ == "__main__":
    main()
