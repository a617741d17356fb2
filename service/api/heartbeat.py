"""When the dispatcher last came through: what an operator is woken by if it stops."""

import time

from service.jobs.dispatcher import Dispatcher


class WatchedDispatcher(Dispatcher):
    """A dispatcher that knows when its last tick ended well, in Unix seconds."""

    ticked_at: float | None = None

    def tick(self) -> None:
        super().tick()
        self.ticked_at = time.time()
