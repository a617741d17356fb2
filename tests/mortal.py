"""A listener that dies in the middle of an evaluation, for tests of what goes on afterwards."""


class Killed(Exception):
    """The death."""


class Kill:
    """Listens to an evaluation's progress and dies once so many predictions are scored."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.num_resumed = 0

    def resumed(self, predictions: int) -> None:
        self.num_resumed = predictions

    def advance(self, predictions: int) -> None:
        self.left -= predictions
        if self.left <= 0:
            raise Killed
