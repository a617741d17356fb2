"""What a sweep has spent and may still spend. Pure; the one place where it is counted.

The unit is the worker-second: a second of one worker of a stage, GPU or not. What a stage found
done costs nothing. What failed or was stopped has been paid for all the same.
"""

from dataclasses import dataclass
from typing import Any

from service.ledger import SweepView
from service.specs import Budget

PHASES = ("search", "final", "confirm")


def spent(view: SweepView, workers: int, *, upto: int | None = None) -> dict[str, float]:
    """Worker-seconds by phase that the ledger knows of, in its first `upto` events if told:
    trainings and trunks hold `workers` workers, a final one."""
    seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    for event in view.paid:
        if upto is not None and event["seq"] > upto:
            continue
        is_final = event["event"] in ("final_scored", "final_ranked")
        is_confirm = event.get("phase") == "confirm"
        phase = "confirm" if is_confirm else "final" if is_final else "search"
        seconds[phase] += event["occupied_s"] * (1 if is_final else workers)
    return seconds


def spent_before(view: SweepView, num_events: int) -> float:
    """Worker-seconds that were spent by a ledger's event of that number."""
    return sum(spent(view, _workers(view), upto=num_events).values())


def under_way(view: SweepView, now: float, after: int) -> float:
    """Worker-seconds until `now` (Unix seconds) of the trainings that run, which are counted once
    they end. Those started by event `after` were an earlier run's, and have died with it."""
    began = [event["at"] for event in view.running.values() if event["seq"] > after]
    return sum(max(0.0, now - at) for at in began) * _workers(view)


def _workers(view: SweepView) -> int:
    spec: dict[str, Any] = view.started.get("spec") or {}
    resources: dict[str, Any] = spec.get("resources") or {}
    return resources.get("workers", 1)


@dataclass(frozen=True, slots=True)
class Account:
    """A sweep's budget, from its first start (Unix seconds) on."""

    budget: Budget
    started_at: float

    @property
    def limit_s(self) -> float | None:
        """Worker-seconds that may be spent: the tighter of hours and money."""
        budget = self.budget
        limits = [
            hours * 3600.0
            for hours in (
                budget.gpu_hours,
                None
                if budget.usd is None or budget.usd_per_gpu_hour is None
                else budget.usd / budget.usd_per_gpu_hour,
            )
            if hours is not None
        ]
        return min(limits, default=None)

    def refuses(
        self,
        spent_s: float,
        cost_s: float,
        reserve_s: float,
        now: float,
        *,
        is_running: bool = False,
    ) -> str | None:
        """Say why something that costs `cost_s` may not start, or go on if it `is_running`; None
        if it may. `spent_s` includes what is under way, `reserve_s` is kept for later phases.
        """
        hours = self.budget.deadline_hours
        if hours is not None and now >= self.started_at + hours * 3600.0:
            return f"budget.deadline_hours={hours:g} are over"
        limit = self.limit_s
        if limit is None:
            return None
        kept = reserve_s if self.budget.reserve_for_confirm else 0.0
        if spent_s + cost_s + kept <= limit and (is_running or spent_s < limit):
            return None
        figures = [f"spent {spent_s / 3600:.3f} of {limit / 3600:.3f} GPU-hours"]
        if not is_running:
            figures.append(f"the next stage needs about {cost_s / 3600:.3f}")
            figures += [f"{kept / 3600:.3f} are kept for the confirmation"] if kept else []
        return "budget: " + ", ".join(figures)

    def is_used_up(self, spent_s: float, now: float) -> bool:
        """Whether nothing more may start, in whichever phase."""
        return self.refuses(spent_s, 0.0, 0.0, now) is not None


def seconds_per_step(view: SweepView) -> float | None:
    """Seconds that a gang was held for each step it computed, over all that it has finished."""
    steps = seconds = 0.0
    for event in view.paid:
        result: dict[str, Any] = event.get("result") or {}
        done: int = event.get("steps_computed") or result.get("steps_computed") or 0
        if done:
            steps, seconds = steps + done, seconds + event["occupied_s"]
    return seconds / steps if steps else None
