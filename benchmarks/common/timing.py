"""Times of calls that are made in turn, so that all of them meet the same machine."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Times", "in_turn", "timing_row"]

Times = dict[str, list[float]]

SLOW_SECONDS = 2.0


def in_turn(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    seconds: float = SLOW_SECONDS,
) -> Times:
    """Times every call once a round, after ``warm_up`` rounds, one at least.

    Each round starts with another call, since a call leaves its data in the caches. A slow call
    takes part in as many rounds as fit into ``seconds``, in two at least.

    Returns:
        Milliseconds of each call, one for each round that it took part in.
    """
    times: Times = {name: [] for name in calls}
    for _ in range(warm_up):
        warm = {name: _milliseconds(call) for name, call in calls.items()}
    shares = {name: max(2, int(1e3 * seconds / warm[name])) for name in calls}
    names = list(calls)
    for i in range(rounds):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            if i < shares[name]:
                times[name].append(_milliseconds(calls[name]))
    return times


def timing_row(times: Times) -> dict[str, Any]:
    """The statistics of one row of a table.

    Args:
        times: of :func:`in_turn`; all are compared with the first.

    Returns:
        "times": for each call median and minimum (ms) and all runs; "figures": "a / b", the median
        of the ratios of paired runs, for the first call a and each other b, and "b / a".
    """
    reference, *others = times
    figures = {f"{reference}, ms": statistics.median(times[reference])}
    for other in others:
        pairs = list(zip(times[reference], times[other], strict=False))
        ratio = statistics.median(a / b for a, b in pairs)
        figures[f"{reference} / {other}"] = ratio
        figures[f"{other} / {reference}"] = 1 / ratio
    return {
        "times": {
            name: {"median": statistics.median(runs), "minimum": min(runs), "runs": runs}
            for name, runs in times.items()
        },
        "figures": figures,
    }


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)
