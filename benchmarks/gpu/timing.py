"""Times of calls on a GPU."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

__all__ = ["Call", "compare", "gpu_times"]

Call = Callable[[], object]

TURNS = 3


def gpu_times(calls: Sequence[Call], rounds: int) -> list[float]:
    """Milliseconds on the GPU of ``rounds`` calls, the members of ``calls`` in turn.

    Events stand between calls that are queued up behind a pause, so that Python is not in the
    times where the GPU is the slower of the two.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)  # clock ticks, about 10 ms
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for i in range(rounds):
        calls[i % len(calls)]()
        events[i + 1].record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]


def compare(sets: Mapping[str, Sequence[Call]], rounds: int) -> dict[str, Any]:
    """Times every library's calls, the libraries in turn.

    Args:
        sets: for each library its call on each set of inputs; "ours" is compared with the others.
        rounds: calls of one turn.

    Returns:
        "times": for each library median and minimum (ms on the GPU), and "host" (ms from Python,
        one call after another); "figures": "a / b" of ours and each other, of the medians.
    """
    turns: dict[str, list[float]] = {name: [] for name in sets}
    names = list(sets)
    for turn in range(TURNS):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            turns[name] += gpu_times(sets[name], rounds)
    times = {
        name: {
            "median": statistics.median(runs),
            "minimum": min(runs),
            "host": _host_time(sets[name], rounds),
        }
        for name, runs in turns.items()
    }
    figures = {}
    for name in names:
        if name != "ours":
            ratio = times[name]["median"] / times["ours"]["median"]
            figures[f"{name} / ours"] = ratio
            figures[f"ours / {name}"] = 1 / ratio
    return {"times": times, "figures": figures}


def _host_time(calls: Sequence[Call], rounds: int) -> float:
    start = time.perf_counter()
    for i in range(rounds):
        calls[i % len(calls)]()
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / rounds
