"""The learning-rate schedule, and when what acts late begins. Pure."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace

from trainer.errors import UsageError
from trainer.specs.task import Departure
from trainer.specs.train import Averages, Late, TrainSpec


def progress(spec: TrainSpec, step: int, elapsed_s: float) -> float:
    """Return the share of the run that is done before step `step` (from 0), at most 1.

    Of the iterations or, by wall clock, of the clock.
    """
    if spec.schedule.basis == "steps":
        return min(step / spec.iterations, 1.0)
    assert spec.max_clock_s is not None  # checked by the spec
    return min(elapsed_s / spec.max_clock_s, 1.0)


def lr_scale(spec: TrainSpec, step: int, elapsed_s: float) -> float:
    """Return the factor on every learning rate for step `step` (from 0), `elapsed_s` into the run.

    Source: techniques 2.18. By steps it falls linearly over the last `warmdown_iters` of
    `iterations`; by wall clock it does so over the last `warmdown_iters · pace` seconds of
    `max_clock_s`, where pace is the mean seconds a step has taken so far. With a
    `warmdown_fraction` it falls over that share of the run instead.
    """
    schedule = spec.schedule
    if schedule.warmdown_fraction is not None:
        scale = (1.0 - progress(spec, step, elapsed_s)) / schedule.warmdown_fraction
    elif schedule.warmdown_iters == 0:
        return 1.0
    elif schedule.basis == "steps":
        scale = (spec.iterations - step) / schedule.warmdown_iters
    else:
        assert spec.max_clock_s is not None  # checked by the spec
        warmdown_s = schedule.warmdown_iters * elapsed_s / max(step, 1)
        left_s = max(spec.max_clock_s - elapsed_s, 0.0)
        scale = left_s / warmdown_s if warmdown_s > 0 else 1.0
    return max(min(scale, 1.0), schedule.min_lr_scale)


def has_begun(late: Late, scale: float, share_done: float) -> bool:
    """Whether it is time for `late`, at this lr scale and this progress of the run."""
    if late.lr_scale is not None:
        return scale < late.lr_scale
    assert late.progress is not None  # checked by the spec
    return share_done >= late.progress


def has_departed(departure: Departure, spec: TrainSpec, step: int, elapsed_s: float) -> bool:
    """Whether a training that leaves its trunk at `departure` no longer shares step `step` (from
    0), `elapsed_s` into the run. `spec` is the trunk's: its iterations and its clock.
    """
    if departure.schedule is None:
        assert departure.step is not None  # checked by the spec
        return step >= departure.step
    own = replace(spec, schedule=departure.schedule, averages=Averages(), qat=None)
    scale, share_done = lr_scale(own, step, elapsed_s), progress(own, step, elapsed_s)
    return scale < 1.0 or any(has_begun(late, scale, share_done) for late in departure.starts)


def check_late_parts(spec: TrainSpec, average: str, where: str) -> None:
    """Raise UsageError for what would begin late but never comes: fake quantization, or the
    snapshots of the `average` that a final takes. By wall clock it shows only on the way.
    """
    if spec.schedule.basis != "steps":
        return
    swa, qat = spec.averages.swa, spec.qat
    if average == "swa" and swa is not None:
        begins = start_step(spec, swa.start)
        if first_snapshot(begins, swa.every) >= spec.iterations:
            raise UsageError(
                f"{where}: train.averages.swa takes no snapshot in {spec.iterations} iterations; "
                "lower swa.every or let swa.start come earlier"
            )
    if qat is None or qat.start is None:
        return
    if start_step(spec, qat.start) == spec.iterations:
        raise UsageError(
            f"{where}: train.qat.start never comes in {spec.iterations} iterations; let it come "
            "earlier or lengthen the warmdown"
        )


def start_step(spec: TrainSpec, start: Late) -> int:
    """Return the first step, from 0, at which `start` has come; `iterations` if it never does.

    For a schedule by steps.
    """
    return first_step(spec, lambda scale, share_done: has_begun(start, scale, share_done))


def first_step(spec: TrainSpec, test: Callable[[float, float], bool]) -> int:
    """Return the first step, from 0, at whose lr scale and progress `test` holds; `iterations` if
    there is none. For a schedule by steps, and a test that stays true once it is.
    """

    def holds(step: int) -> bool:
        return test(lr_scale(spec, step, 0.0), progress(spec, step, 0.0))

    return bisect_left(range(spec.iterations), True, key=holds)


def first_snapshot(begins: int, every: int) -> int:
    """Return the first step from `begins` on, from 0, after which SWA takes a snapshot."""
    return begins + -(begins + 1) % every
