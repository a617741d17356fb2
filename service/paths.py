"""The name of every file the service writes, in one place.

    HOME/                         .fairway in the working directory unless told otherwise
      data/NAME/                  prepared shards with manifest.json and tokenizer.model
      store/trainings/ID/         task.json inputs.json metrics.jsonl checkpoint/ bank/ result.json
      store/parities/ID/          result.json
      store/finals/ID/            task.json artifact/ score.json audit.json result.json sheet.json
                                  and in every stage facts.json: what it was computed with
      sweeps/SWEEP_ID/            sweep.yaml events.jsonl tracking.json report/ logs/
                                  control.json: what the run under way is told; jobs/: a service's
                                  dirty-SHA256.diff: what the code had over its commit
      submissions/DIGEST/         sweep.yaml, the files it names, submission.json
      compiled/                   what torch.compile has made; may be removed at any time
      mlflow.db mlruns/           the embedded MLflow
      outbox.json                 how far behind its ledgers MLflow is

result.json is written last: a stage without one is not done.
"""

from dataclasses import dataclass
from pathlib import Path

from trainer.codec import suggest
from trainer.errors import UsageError


@dataclass(frozen=True, slots=True)
class SweepPaths:
    """One sweep's folder."""

    root: Path

    @property
    def spec(self) -> Path:
        return self.root / "sweep.yaml"

    @property
    def ledger(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def tracking(self) -> Path:
        """Which MLflow run is which stage, and how far the projection has come."""
        return self.root / "tracking.json"

    @property
    def refused(self) -> Path:
        """Why the sweep is not in MLflow: a JSON object a line, the newest last."""
        return self.root / "tracking-refused.jsonl"

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def control(self) -> Path:
        """What the run of the sweep that is under way is told."""
        return self.root / "control.json"

    def diff(self, sha256: str) -> Path:
        """What the code had over its commit, by the sha256 of that text."""
        return self.root / f"dirty-{sha256[:12]}.diff"

    @property
    def jobs(self) -> Path:
        """What the service knows of the processes that it has started for the sweep."""
        return self.root / "jobs"


@dataclass(frozen=True, slots=True)
class Paths:
    """A Fairway home."""

    home: Path

    def data(self, name: str) -> Path:
        return self.home / "data" / name

    @property
    def store(self) -> Path:
        return self.home / "store"

    @property
    def sweeps(self) -> Path:
        return self.home / "sweeps"

    def sweep(self, sweep_id: str) -> SweepPaths:
        return SweepPaths(self.sweeps / sweep_id)

    @property
    def submissions(self) -> Path:
        """What was submitted to the service, a folder each."""
        return self.home / "submissions"

    @property
    def outbox(self) -> Path:
        """How the service's projection into MLflow stands."""
        return self.home / "outbox.json"

    @property
    def compiled(self) -> Path:
        """What torch.compile has made, for every process that needs the same again."""
        return self.home / "compiled"

    @property
    def mlflow_db(self) -> Path:
        return self.home / "mlflow.db"

    @property
    def mlflow_artifacts(self) -> Path:
        return self.home / "mlruns"


def find_sweep(paths: Paths, ref: str | None) -> SweepPaths:
    """Find a sweep by id, a unique start of it, or its name; the newest without a reference."""
    ledgers = sorted(paths.sweeps.glob("*/events.jsonl"), key=lambda path: path.stat().st_mtime)
    found = [path.parent.name for path in ledgers]
    if not found:
        raise UsageError(f"{paths.sweeps}: no sweep has run here; start one with `fairway run`")
    if ref is None:
        return paths.sweep(found[-1])
    matching = [sweep for sweep in found if sweep.startswith(ref)]
    if ref in matching:
        return paths.sweep(ref)
    named = [sweep for sweep in found if sweep.rpartition("-")[0] == ref]
    if named or len(matching) == 1:
        return paths.sweep((named or matching)[-1])  # the newest of that name
    if matching:
        raise UsageError(f"{ref!r} fits {len(matching)} sweeps: {', '.join(matching)}")
    raise UsageError(f"no sweep {ref!r} under {paths.sweeps}{suggest(ref, found)}")


def is_taken(folder: Path) -> bool:
    """Whether something is in the way of a new folder: a file, or a folder that holds anything."""
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
