"""Ray Tune's side of a search: it starts the trials, we say what each of them is.

Tune decides when a trial starts and where, and starts one again whose process died. What comes
next, and whether anything may, is asked here before every launch.
"""

import logging
import tempfile
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune import PlacementGroupFactory, RunConfig, TuneConfig
from ray.tune.search import Searcher

TrialConfig = dict[str, str]
"""stage: the id that the ledger knows it by; job: JSON for the trial."""


class JobSearcher(Searcher):
    """Hands Tune one job after another until there are none."""

    def __init__(self, next_job: Callable[[], TrialConfig | None]) -> None:
        super().__init__(metric="val_bpb", mode="min")
        self._next_job = next_job

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        job = self._next_job()
        return self.FINISHED if job is None else dict(job)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """The ledger is told by the callbacks; what comes next is read from there."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to keep: after a crash the ledger is replayed."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing was kept."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "JobSearcher":
        return self  # a copy would hand out the same jobs again

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles the searcher into records of its own, which nothing here ever restores.
        return {}


def run_trials(
    name: str,
    trial: Callable[[dict[str, Any]], None],
    next_job: Callable[[], TrialConfig | None],
    resources: dict[str, float],
    at_once: int | None,
    retries: int,
    watch: tune.Callback,
) -> None:
    """Run trials until `next_job` has none left, at most `at_once` at a time."""
    # It writes the trace of each trial that died to stderr; the ledger has the reason.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # Tune's own records are of no use to us afterwards: the store and the ledger are.
    with tempfile.TemporaryDirectory(prefix="fairway-tune-") as storage:
        tune.Tuner(
            tune.with_resources(trial, PlacementGroupFactory([resources])),
            tune_config=TuneConfig(
                search_alg=JobSearcher(next_job),
                num_samples=-1,
                max_concurrent_trials=at_once,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=RunConfig(
                name=name,
                storage_path=storage,
                verbose=0,
                callbacks=[watch],
                failure_config=tune.FailureConfig(max_failures=retries),
            ),
        ).fit()
