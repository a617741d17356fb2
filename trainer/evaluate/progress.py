"""How far an evaluation is, told to whoever asked. What is shown, and where, is the caller's."""

from typing import Protocol


class Progress(Protocol):
    """Hears how many predictions are scored: `resumed` those of an earlier attempt."""

    def resumed(self, predictions: int) -> None: ...

    def advance(self, predictions: int) -> None: ...


class Silent:
    """Shows nothing."""

    def resumed(self, predictions: int) -> None:
        pass

    def advance(self, predictions: int) -> None:
        pass
