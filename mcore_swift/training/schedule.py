"""The learning rate as a pure function of the step: nothing to save, nothing that a resume can get wrong.

The curves are those of Megatron's `OptimizerParamScheduler` and of transformers' `get_*_schedule_with_warmup`, which
agree with each other. Like both, warm-up starts *at* 0: step k (counted from 0) of a warm-up of w steps uses
`k / w` of the learning rate, so the first step moves nothing and step w is the first at the full rate. (The one
disagreement: transformers' wsd warms up from the minimum instead of 0; here, as in Megatron, from 0.)
"""

from __future__ import annotations

import math

from mcore_swift.errors import InputError
from mcore_swift.recipe import ScheduleSection


def learning_rate(step: int, *, schedule: ScheduleSection, total_steps: int) -> float:
    """The learning rate of the step that follows `step` finished steps (0 for the first); see `check_schedule`."""
    peak, floor = schedule.learning_rate, schedule.min_learning_rate
    if step < schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.decay == "constant":
        return peak
    decay_start = schedule.warmup_steps
    if schedule.decay == "wsd":
        assert schedule.decay_steps is not None
        decay_start = total_steps - schedule.decay_steps
    progress = (step - decay_start) / max(1, total_steps - decay_start)
    progress = min(1.0, max(0.0, progress))
    remaining = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule.decay == "cosine" else 1.0 - progress
    return floor + (peak - floor) * remaining


def check_schedule(schedule: ScheduleSection, *, total_steps: int) -> None:
    """Raises InputError when the schedule's numbers can't all be honoured in a run of `total_steps`."""
    peak, floor, decay = schedule.learning_rate, schedule.min_learning_rate, schedule.decay
    if not 0 <= floor <= peak:
        raise InputError(
            f"schedule.min_learning_rate is {floor:g}: it must lie between 0 and schedule.learning_rate ({peak:g})."
        )
    if decay == "constant" and floor > 0:
        raise InputError(
            f"schedule.min_learning_rate is {floor:g}, but schedule.decay: constant never decays: "
            "leave it out, or use cosine, linear or wsd."
        )
    if not 0 <= schedule.warmup_steps < total_steps:
        raise InputError(
            f"schedule.warmup_steps is {schedule.warmup_steps}, but the run has {total_steps} steps: "
            f"0 to {total_steps - 1} are possible."
        )
    if (decay == "wsd") != (schedule.decay_steps is not None):
        raise InputError(
            "schedule.decay: wsd needs schedule.decay_steps (the steps of its final decay)."
            if decay == "wsd"
            else f"schedule.decay_steps is {schedule.decay_steps}, but only schedule.decay: wsd uses it, not {decay}."
        )
    longest = total_steps - schedule.warmup_steps
    if schedule.decay_steps is not None and not 1 <= schedule.decay_steps <= longest:
        raise InputError(
            f"schedule.decay_steps is {schedule.decay_steps}: after {schedule.warmup_steps} warm-up steps of "
            f"{total_steps} in all, 1 to {longest} are possible."
        )
