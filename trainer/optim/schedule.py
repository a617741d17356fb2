"""The learning-rate schedule. Pure."""

from trainer.specs.train import TrainSpec


def lr_scale(spec: TrainSpec, step: int, elapsed_s: float) -> float:
    """Return the factor on every learning rate for step `step` (from 0), `elapsed_s` into the run.

    Source: techniques 2.18. By steps it falls linearly over the last `warmdown_iters` of
    `iterations`; by wall clock it does so over the last `warmdown_iters · pace` seconds of
    `max_clock_s`, where pace is the mean seconds a step has taken so far.
    """
    warmdown = spec.schedule.warmdown_iters
    if warmdown == 0:
        return 1.0
    if spec.schedule.basis == "steps":
        scale = (spec.iterations - step) / warmdown
    else:
        assert spec.max_clock_s is not None  # checked by the spec
        warmdown_s = warmdown * elapsed_s / max(step, 1)
        left_s = max(spec.max_clock_s - elapsed_s, 0.0)
        scale = left_s / warmdown_s if warmdown_s > 0 else 1.0
    return max(min(scale, 1.0), spec.schedule.min_lr_scale)
