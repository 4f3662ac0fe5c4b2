"""Which losses count as spikes; a resumed run judges like an uninterrupted one."""

from __future__ import annotations

import json
import math
import random
import statistics

import pytest

from macpo.engine.training.spikes import WARM_UP, WINDOW, SpikeGuard


def noisy(count: int, level: float = 2.0, deviation: float = 0.1, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(level, deviation) for _ in range(count)]


def seen(guard: SpikeGuard, values: list[float]) -> list[float | None]:
    return [guard.see(value) for value in values]


def test_the_score_is_the_distance_in_deviations() -> None:
    guard, values = SpikeGuard(6.0), noisy(WINDOW)
    assert seen(guard, values) == [None] * WINDOW
    mean, deviation = statistics.fmean(values), statistics.pstdev(values)
    assert guard.judge(mean + 5.9 * deviation) is None
    assert guard.see(mean + 8.0 * deviation) == pytest.approx(8.0, rel=1e-9)


def test_noise_trends_and_drops_are_no_spikes() -> None:
    for seed in range(20):
        assert seen(SpikeGuard(6.0), noisy(2000, seed=seed)) == [None] * 2000
    falling = [10.0 * math.exp(-step / 50) + noise for step, noise in enumerate(noisy(500, 0.5, 0.05))]
    assert seen(SpikeGuard(6.0), falling) == [None] * 500
    dropped = noisy(100) + noisy(100, level=0.5)
    assert seen(SpikeGuard(6.0), dropped) == [None] * 200, "only what lies above is a spike"


def test_nothing_is_judged_while_it_warms_up_and_flat_losses_need_more_than_noise() -> None:
    assert seen(SpikeGuard(6.0), [1.0] * (WARM_UP - 1) + [1e6]) == [None] * WARM_UP
    guard = SpikeGuard(6.0)
    assert seen(guard, [0.693] * 30 + [0.70]) == [None] * 31, "a hundredth of the mean is no spike on a flat curve"
    assert guard.see(0.9) is not None
    assert seen(SpikeGuard(6.0), [0.0] * 30) == [None] * 30


def test_a_spike_does_not_hide_the_next_and_a_lasting_level_becomes_normal() -> None:
    guard = SpikeGuard(6.0)
    seen(guard, noisy(100))
    assert guard.see(50.0) is not None and guard.see(2.0) is None and guard.see(50.0) is not None
    later = seen(guard, noisy(100, level=4.0))
    assert later[0] is not None and later[-50:] == [None] * 50


@pytest.mark.parametrize("cut", [0, 1, WARM_UP, 75, 150])
def test_a_resumed_guard_judges_to_the_bit_as_the_uninterrupted_one(cut: int) -> None:
    values = [*noisy(150), 9.0, 2.0, 9.5, *noisy(50, seed=1)]
    whole = seen(SpikeGuard(6.0), values)
    assert sum(score is not None for score in whole) == 2
    before, after = SpikeGuard(6.0), SpikeGuard(6.0)
    first = seen(before, values[:cut])
    after.load_state(json.loads(json.dumps(before.state_dict())))
    assert first + seen(after, values[cut:]) == whole


def test_judging_changes_nothing_and_numbers_that_are_not_finite_are_refused() -> None:
    guard = SpikeGuard(3.0)
    seen(guard, noisy(40))
    state = guard.state_dict()
    assert guard.judge(100.0) is not None and guard.state_dict() == state
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="no place"):
            guard.see(value)
    assert guard.state_dict() == state
