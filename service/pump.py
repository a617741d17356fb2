"""A function called again and again beside other work, for as long as a block lasts."""

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

PERIOD_S = 0.5


@contextmanager
def pumping(work: Callable[[], None], period_s: float = PERIOD_S) -> Generator[None]:
    """Call `work` every `period_s` seconds in a thread, and once more at the end. What it raises
    ends the thread and is raised where the block ends.
    """
    stop, failures = threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            while not stop.wait(period_s):
                work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="pump", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]
    work()
