"""The learning rate against both implementations whose curves it promises, and the settings it must refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mcore_swift.errors import InputError
from mcore_swift.recipe import ScheduleSection
from mcore_swift.training.schedule import check_schedule, learning_rate

TOTAL = 50
PEAK = 3.0e-4


def section(**changes) -> ScheduleSection:
    return ScheduleSection(steps=TOTAL, learning_rate=PEAK, **changes)


def curve(schedule: ScheduleSection) -> list[float]:
    return [learning_rate(step, schedule=schedule, total_steps=TOTAL) for step in range(TOTAL)]


def optimizer_curve(make: Callable) -> list[float]:
    """The learning rates that `make(optimizer)`, a torch scheduler, uses for each of the steps."""
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler, rates = make(optimizer), []
    for _ in range(TOTAL):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_transformers_gives_the_same_rates(warmup: int):
    from transformers import optimization as oracle

    pairs = {
        "cosine": lambda o: oracle.get_cosine_schedule_with_warmup(o, warmup, TOTAL),
        "linear": lambda o: oracle.get_linear_schedule_with_warmup(o, warmup, TOTAL),
        "constant": lambda o: oracle.get_constant_schedule_with_warmup(o, warmup),
    }
    for decay, make in pairs.items():
        expected = optimizer_curve(make)
        assert curve(section(decay=decay, warmup_steps=warmup)) == pytest.approx(expected, rel=1e-13, abs=0), decay
    expected = optimizer_curve(lambda o: oracle.get_wsd_schedule(o, warmup, 10, TOTAL, decay_type="linear"))
    assert curve(section(decay="wsd", decay_steps=10, warmup_steps=warmup)) == pytest.approx(expected, rel=1e-12, abs=0)
    make = lambda o: oracle.get_cosine_with_min_lr_schedule_with_warmup(o, warmup, TOTAL, min_lr=3e-5)  # noqa: E731
    ours = curve(section(decay="cosine", min_learning_rate=3e-5, warmup_steps=warmup))
    assert ours == pytest.approx(optimizer_curve(make), rel=1e-13, abs=0)


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("decay", ["cosine", "linear", "wsd", "constant"])
def test_megatron_gives_the_same_rates(warmup: int, decay: str):
    import torch
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    floor = 0.0 if decay == "constant" else 2e-5
    decay_steps = 10 if decay == "wsd" else None
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = OptimizerParamScheduler(
        optimizer,  # pyright: ignore[reportArgumentType]
        init_lr=0.0,
        max_lr=PEAK,
        min_lr=floor,
        lr_warmup_steps=warmup,
        lr_decay_steps=TOTAL,
        lr_decay_style="WSD" if decay == "wsd" else decay,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=TOTAL,
        wd_incr_style="constant",
        wsd_decay_steps=decay_steps,
        lr_wsd_decay_style="linear",
    )
    ours = section(decay=decay, min_learning_rate=floor, warmup_steps=warmup, decay_steps=decay_steps)
    for step in range(TOTAL + 3):  # and what comes after the planned end
        rate = learning_rate(step, schedule=ours, total_steps=TOTAL)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-13, abs=0), step
        scheduler.step(1)


def test_the_corners_of_a_wsd_run():
    schedule = section(decay="wsd", decay_steps=10, warmup_steps=5, min_learning_rate=1e-4)
    rates = curve(schedule)
    assert rates[0] == 0.0
    assert rates[1] == PEAK / 5
    assert rates[5:41] == [PEAK] * 36
    assert rates[45] == pytest.approx(2e-4, rel=1e-14)
    assert learning_rate(TOTAL, schedule=schedule, total_steps=TOTAL) == 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"min_learning_rate": 1.0},
            "min_learning_rate is 1: it must lie between 0 and schedule.learning_rate (0.0003)",
        ),
        ({"min_learning_rate": 1e-6, "decay": "constant"}, "constant never decays"),
        ({"warmup_steps": 50}, "warmup_steps is 50, but the run has 50 steps: 0 to 49 are possible"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"decay": "wsd"}, "wsd needs schedule.decay_steps"),
        ({"decay": "cosine", "decay_steps": 5}, "decay_steps is 5, but only schedule.decay: wsd uses it, not cosine"),
        ({"decay": "wsd", "decay_steps": 45, "warmup_steps": 6}, "decay_steps is 45: after 6 warm-up steps of 50"),
        ({"decay": "wsd", "decay_steps": 0}, "1 to 50 are possible"),
    ],
)
def test_settings_that_cannot_be_honoured(changes: dict, message: str):
    with pytest.raises(InputError) as caught:
        check_schedule(section(**changes), total_steps=TOTAL)
    assert message in str(caught.value)


def test_settings_that_can_be_honoured():
    check_schedule(section(), total_steps=1)
    check_schedule(section(decay="wsd", decay_steps=44, warmup_steps=6, min_learning_rate=PEAK), total_steps=TOTAL)
