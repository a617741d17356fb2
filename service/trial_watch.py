"""What Ray Tune tells of its trials, passed on to the recorder."""

import json
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from service.recorder import Outcome, Recorder
from service.searcher import TrialConfig
from service.states import State


class TrialWatch(tune.Callback):
    """Hears of Tune's trials in the driver's process and tells the recorder."""

    def __init__(self, recorder: Recorder, kind: str) -> None:
        self.recorder = recorder
        self.kind = kind
        self._unbegun: list[TrialConfig] = []

    def take_unbegun(self) -> list[TrialConfig]:
        """Return what was lost before it began, to be started anew, and forget it."""
        taken, self._unbegun = self._unbegun, []
        return taken

    def give_up(self, unbegun: list[TrialConfig]) -> None:
        """Record as failed what was lost before it began once too often."""
        for config in unbegun:
            self._lost(config)

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles callbacks into records of its own, which nothing here ever restores.
        return {"kind": self.kind}

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        if self.kind == "training":
            trunks = [trunk["id"] for trunk in json.loads(trial.config["job"])["trunks"]]
            training = self.recorder.trainings[trial.config["stage"]]
            self.recorder.training_started(training, trunks[::-1])

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        self._end(json.loads(trial.last_result["outcome"]))

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        # What a trial can catch it reports; only the death of its process, again and again, ends
        # here. But Tune tries nothing again whose process died between two trials, when the next
        # one was handed to it already.
        if trial.run_metadata.num_failures <= trial.max_failures:
            self._unbegun.append(dict(trial.config))
        else:
            self._lost(trial.config)

    def _lost(self, config: TrialConfig) -> None:
        lost = {"state": State.FAILED, "reason": "the trial's process died", "result": None}
        work = {"kind": self.kind, "cached": False}
        name = "training" if self.kind == "training" else "final"
        self._end({name: config["stage"], **work, **lost})

    def _end(self, outcome: Outcome) -> None:
        if self.kind == "training":
            self.recorder.training_ended(outcome)
        else:
            self.recorder.final_ended(outcome)
