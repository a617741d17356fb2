"""When the dispatcher last came through: what an operator is woken by if it stops."""

import threading
import time

from service.jobs.dispatcher import Dispatcher


class WatchedDispatcher(Dispatcher):
    """A dispatcher that knows when its last tick ended well, in Unix seconds."""

    ticked_at: float | None = None
    """None before it runs; when it began to, before its first tick."""

    def run_forever(self, stop: threading.Event) -> None:
        self.ticked_at = time.time()
        super().run_forever(stop)

    def tick(self) -> None:
        super().tick()
        self.ticked_at = time.time()
