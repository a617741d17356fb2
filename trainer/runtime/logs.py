"""Logging, configured once per process: human lines on stderr, from the first rank only."""

import logging
import sys


def configure(rank: int = 0, level: int = logging.INFO) -> None:
    """Send log records to stderr; ranks above 0 only warn."""
    handler = logging.StreamHandler(sys.stderr)
    prefix = f"rank{rank} " if rank else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    root = logging.getLogger("trainer")
    root.handlers[:] = [handler]
    root.setLevel(level if rank == 0 else logging.WARNING)
    root.propagate = False
