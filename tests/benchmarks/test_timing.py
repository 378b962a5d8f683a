"""benchmarks/common/timing.py: who is called how often."""

from collections import Counter

import pytest

from benchmarks.common import timing


@pytest.fixture
def calls(monkeypatch):
    """Calls of "fast", 0.1 s, and "slow", 1.5 s, by a clock that only they advance."""
    now, counts = [0.0], Counter()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call(name, seconds):
        counts[name] += 1
        now[0] += seconds

    return counts, {
        "fast": lambda: call("fast", 0.1),
        "slow": lambda: call("slow", 1.5),
    }


@pytest.mark.parametrize(
    "seconds, of_slow", [(2.0, 2), (4.6, 3), (3600.0, 7)], ids=["two at least", "three fit", "all"]
)
def test_slow_calls_take_part_in_what_fits(calls, seconds, of_slow):
    counts, functions = calls
    times = timing.in_turn(functions, rounds=7, warm_up=4, seconds=seconds)
    assert counts == {"fast": 4 + 7, "slow": 4 + of_slow}
    assert times["fast"] == pytest.approx([100.0] * 7)
    assert times["slow"] == pytest.approx([1500.0] * of_slow)
