"""The weight of every kind of schedule at chosen progresses."""

import pytest
import torch

from mclr.combinations import SCHEDULES
from mclr.schedule import NONE, Schedule

PROGRESS = [0.0, 0.2, 0.5, 0.8, 1.0]
WEIGHTS = [
    (Schedule("constant", 0.7), [0.7, 0.7, 0.7, 0.7, 0.7]),
    (Schedule("ramp", 2.0), [0.0, 0.4, 1.0, 1.6, 2.0]),
    (Schedule("interval", 1.5, low=0.2, high=0.5), [0.0, 1.5, 1.5, 0.0, 0.0]),
    (Schedule("interval", 1.5), [1.5, 1.5, 1.5, 1.5, 1.5]),
    (Schedule("negative_window", 3.0, turn=0.5, below=0.6), [3.0, 3.0, -0.6, -0.6, -0.6]),
    (Schedule("constant", -0.5), [-0.5, -0.5, -0.5, -0.5, -0.5]),
    (NONE, [0.0, 0.0, 0.0, 0.0, 0.0]),
]


@pytest.mark.parametrize(("schedule", "weights"), WEIGHTS, ids=str)
def test_weights(schedule, weights):
    progress = torch.tensor(PROGRESS)
    assert schedule(progress).tolist() == pytest.approx(weights)
    # a number and a tensor of any shape, the same weight to the bit
    assert [schedule.at(p) for p in PROGRESS] == schedule(progress).tolist()
    grid = progress[:4].view(2, 1, 2)
    assert torch.equal(schedule(grid), schedule(progress)[:4].view(2, 1, 2))
    assert schedule(progress.double()).dtype == schedule(progress).dtype == torch.float32


@pytest.mark.parametrize("schedule", [schedule for schedule, _ in WEIGHTS], ids=str)
def test_it_jumps_at_its_bounds_alone_and_knows_when_it_is_zero(schedule):
    progress = torch.linspace(1e-4, 1 - 1e-4, 2000, dtype=torch.float64)
    weights = schedule(progress)
    assert schedule.is_zero == weights.eq(0).all()
    jumps = progress[1:][weights.diff().abs() > 0.1].tolist()
    assert jumps == pytest.approx([p for p in schedule.bounds if 0 < p < 1], abs=1e-3)


def test_every_kind_is_covered():
    assert {schedule.kind for schedule, _ in WEIGHTS} == set(SCHEDULES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "linear"}, "'linear' is not one of constant, ramp, interval, negative_window"),
        ({"kind": "ramp", "weight": float("inf")}, "weight=inf of a schedule must be a finite number"),
        ({"kind": "interval", "low": 0.6, "high": 0.4}, "out of range"),
        ({"kind": "negative_window", "turn": 1.5}, "out of range"),
        ({"kind": "negative_window", "below": -1.0}, "out of range"),
    ],
)
def test_what_a_schedule_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**{"weight": 1.0} | settings)
