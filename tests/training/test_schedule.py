"""The learning rate of every step, and of a schedule that changes on the way."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from stamo_dist.optim.schedule import RateSchedule, continued
from stamo_dist.recipe.schema import Recipe


def recipe(steps: int = 100, **optimizer: object) -> Recipe:
    options = {"lr": 1e-3, "warmup_steps": 10, "final_lr": 0.1, **optimizer}
    data = {"sources": {"a": {"path": "a"}}}
    return Recipe.model_validate({"data": data, "optimizer": options, "train": {"steps": steps}})


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({"schedule": "cosine"}, {1: 1e-4, 10: 1e-3, 55: 5.5e-4, 100: 1e-4}),
        ({"schedule": "linear"}, {10: 1e-3, 55: 5.5e-4, 100: 1e-4}),
        ({"schedule": "constant"}, {5: 5e-4, 10: 1e-3, 100: 1e-3}),
        ({"schedule": "inverse_sqrt"}, {10: 1e-3, 40: 5e-4, 90: 1e-3 / 3}),
        ({"schedule": "wsd", "decay_steps": 20}, {10: 1e-3, 80: 1e-3, 90: 5.5e-4, 100: 1e-4}),
        ({"schedule": "wsd", "decay_steps": 0.4}, {60: 1e-3, 80: 5.5e-4, 100: 1e-4}),
        ({"schedule": "wsd", "decay_steps": 0.1, "warmup_steps": 0}, {1: 1e-3, 90: 1e-3, 100: 1e-4}),
    ],
)
def test_rates(options, rates):
    schedule = RateSchedule.of(recipe(**options))
    for step, rate in rates.items():
        assert schedule.at(step) == pytest.approx(rate, rel=1e-9), step


@pytest.mark.parametrize("shape", ["cosine", "linear", "inverse_sqrt", "constant", "wsd"])
def test_a_longer_schedule_starts_at_the_rate_reached(shape):
    """Also once more, and after another change; a start that changes nothing keeps it."""
    before, reached = RateSchedule.of(recipe()), 1e-4
    longer = recipe(steps=200, schedule=shape, schedule_from="here")
    after, notes = continued(before, longer, 100)
    assert "starts at the rate reached, 0.0001" in notes[0]
    assert after.at(100) == after.rate == pytest.approx(reached)
    rates = [after.at(step) for step in range(100, 201)]
    assert all(a >= b for a, b in pairwise(rates))
    assert math.isclose(rates[1], reached, rel_tol=0.01)
    end = {"constant": 1, "inverse_sqrt": math.sqrt(0.5)}.get(shape, 0.1)
    assert rates[-1] == pytest.approx(end * reached)
    assert continued(RateSchedule.from_dict(after.to_dict()), longer, 150) == (after, [])
    again, notes = continued(after, recipe(steps=300, schedule=shape, schedule_from="here"), 200)
    assert notes
    assert again.at(200) == pytest.approx(rates[-1])


def test_a_jump_is_said_with_both_rates():
    before = RateSchedule.of(recipe())
    after, (note,) = continued(before, recipe(steps=200), 100)
    assert after == RateSchedule.of(recipe(steps=200))
    assert f"0.0001 at step 100, then {after.at(101):.4g}" in note
    assert "optimizer.schedule_from=here" in note
    assert continued(before, recipe(), 100) == (before, [])


def test_what_changes_no_rate_is_not_said():
    stable = RateSchedule.of(recipe(schedule="wsd", decay_steps=10))
    after, notes = continued(stable, recipe(steps=200, schedule="wsd", decay_steps=10), 50)
    assert notes == []
    assert after.steps == 200


def test_a_decay_longer_than_the_run():
    with pytest.raises(ValueError, match=r"optimizer\.decay_steps: 120 are more than train\.steps \(100\)"):
        recipe(schedule="wsd", decay_steps=120)
