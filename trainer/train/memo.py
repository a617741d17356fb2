"""What a process keeps from one training to the next. Every result is the same without it."""

from typing import Generic, TypeVar

import numpy as np

from trainer.data.bytecount import ByteTable

T = TypeVar("T")


class Recent(Generic[T]):
    """The last few values by key; the one that was asked for longest ago makes room."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: dict[str, T] = {}

    def get(self, key: str) -> T | None:
        """Return what was kept under this key, None if it is not there any more."""
        if key not in self._values:
            return None
        self._values[key] = self._values.pop(key)
        return self._values[key]

    def keep(self, key: str, value: T) -> T:
        """Keep a value and return it."""
        self._values[key] = value
        for old in list(self._values)[: -self.size]:
            del self._values[old]
        return value


class Memo:
    """Hand the same one to the trainings of a process, and they share what they would all redo."""

    def __init__(self) -> None:
        self.untrained_bpb: Recent[float] = Recent(64)
        """Val bpb of a model as it was built."""
        self.texts: Recent[tuple[np.ndarray, ByteTable]] = Recent(2)
        """Validation tokens, and how many bytes each stands for; megabytes each."""
        self.warmed: Recent[bool] = Recent(64)
        """Whether steps of some shapes have been run."""
