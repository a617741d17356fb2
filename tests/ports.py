"""Ports for servers that a test starts later, or again."""

import os
import random
import socket

_GIVEN: set[int] = set()


def free_port() -> int:
    """A port that nobody has, and that nobody is given before it is used: below those that the
    kernel gives out by itself, of this pytest worker's share, and never the same twice."""
    share = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 10
    first = 20_000 + 1_000 * share
    while True:
        port = random.SystemRandom().randrange(first, first + 1_000)
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in _GIVEN:
            _GIVEN.add(port)
            return port
