"""Whether a training goes on: asked on its way, and answered for all ranks at once."""

from typing import Protocol

import torch

from trainer.errors import BackendError, FairwayError
from trainer.runtime.distributed import Ranks


class Steer(Protocol):
    """Who says on a training's way whether it goes on."""

    def __call__(self, step: int, val_bpb: float | None) -> str | None:
        """Return a reason to stop after `step` steps, None to go on.

        `val_bpb` is given where the model was just scored.
        """
        ...


class Steering:
    """Asks on rank 0 and tells every rank, so that a gang stops after the same step."""

    def __init__(self, steer: Steer | None, ranks: Ranks) -> None:
        self.steer = steer if ranks.is_first else None
        self.ranks = ranks
        self.is_asked = bool(ranks.max(float(self.steer is not None)))

    def ask(self, step: int, val_bpb: float | None = None) -> str | None:
        """Return rank 0's answer on every rank; where asking fails, every rank raises."""
        if not self.is_asked:
            return None
        return self._tell(self.ranks.together(lambda: self._answer(step, val_bpb)))

    def _answer(self, step: int, val_bpb: float | None) -> str | None:
        if self.steer is None:
            return None
        try:
            return self.steer(step, val_bpb)
        except FairwayError:
            raise
        except Exception as error:  # whatever the asking goes through may fail in its own way
            raise BackendError(
                f"step {step}: could not ask whether to go on ({error!r}); run again"
            ) from error

    def _tell(self, reason: str | None) -> str | None:
        """Return the first rank's text on every rank."""
        said = b"" if reason is None else b"\n" + reason.encode()  # never empty for a reason
        length = int(self.ranks.max(len(said)))
        if not length:
            return None
        box = torch.zeros(length, dtype=torch.int64)
        if self.ranks.is_first:
            box[:] = torch.tensor(list(said))
        told = self.ranks.sum(box.to(self.ranks.device))
        return bytes(told.tolist())[1:].decode()
