"""Errors that a user can act on.

    FairwayError
    ├── UsageError         bad spec, file or argument; nothing was spent    exit 2
    │   └── DataError      a shard, tokenizer, bank or artifact is broken   exit 2
    ├── InfeasibleError    finished, but nothing fits or is legal           exit 3
    ├── BudgetError        budget or deadline used up                       exit 4
    ├── BackendError       server, cluster or tracking out of reach         exit 5
    ├── Stopped            ended early on purpose, at a checkpoint          exit 1
    └── TrainingError      a training that would fail again the same way    exit 1
        └── OutOfMemory    it does not fit its device, or the machine       exit 1

Each carries one line that says where, what was found, what was expected and what to do.
Everything else that is raised is a bug.
"""


class FairwayError(Exception):
    """The root; `exit_code` is what the command line returns for it."""

    exit_code = 1


class UsageError(FairwayError):
    """A bad spec, file or argument; nothing was spent."""

    exit_code = 2


class DataError(UsageError):
    """A file is missing, truncated or corrupted; the message starts with its path."""


class InfeasibleError(FairwayError):
    """Everything ran, but nothing fits or nothing is legal."""

    exit_code = 3


class BudgetError(FairwayError):
    """The budget or the deadline is used up."""

    exit_code = 4


class BackendError(FairwayError):
    """A server, cluster or tracking store is out of reach."""

    exit_code = 5


class TrainingError(FairwayError):
    """The training diverged or cannot work as specified; retrying would not help."""


class OutOfMemory(TrainingError):
    """The training does not fit: the message says what it peaked at and what to lower."""


class Stopped(FairwayError):
    """The training was told to stop, for this reason; its checkpoint goes on from there."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
