"""The parts of an operator's benchmark, each a list of steps that yield rows."""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .memory import measure_memory
from .problem import Absent, Call, Case, Operator, Problem, Series
from .timing import in_turn, timing_row

__all__ = ["PARTS", "Row", "Settings", "Step", "operator_steps"]

Row = dict[str, Any]
PARTS = ("forward", "backward", "threads", "growth", "memory")
PASSES = ("forward", "backward")
# What a pass costs beside the forward pass of the same size, all libraries together; for the
# remaining time only
COST = {"forward": 1.0, "backward": 2.0}


@dataclass(frozen=True)
class Settings:
    threads: int
    rounds: int
    quick: bool


@dataclass(frozen=True)
class Step:
    """Something to measure.

    Attributes:
        cost: its duration, in a unit that all steps of a script share.
        run: yields its rows.
    """

    part: str
    label: str
    cost: float
    run: Callable[[], Iterable[Row]]


def operator_steps(operator: Operator, settings: Settings, parts: Iterable[str]) -> list[Step]:
    """All steps of the parts that are asked for."""
    steps = []
    for name in PASSES:
        for case in operator.cases:
            cost = COST[name] * max(case.samples, 10**6)
            run = partial(_timing, case, name, settings)
            steps.append(Step(name, case.name, cost, run))
    for case in operator.threads:
        run = partial(_threads, case, settings)
        steps.append(Step("threads", case.name, 0.5 * case.samples, run))
    for series in operator.growth:
        cost = 0.5 * sum(case.samples for case in series.cases.values())
        run = partial(_growth, series, settings)
        steps.append(Step("growth", series.name, cost, run))
    for series in operator.memory:
        cost = 5e7 + sum(case.samples for case in series.cases.values())
        run = partial(_memory, operator, series, settings)
        steps.append(Step("memory", series.name, cost, run))
    return [step for step in steps if step.part in parts]


def _timing(case: Case, name: str, settings: Settings) -> Iterator[Row]:
    """Ours and every peer's."""
    row: Row = {"case": case.name, "description": case.description}
    try:
        problem = case.build()
    except Absent as reason:
        yield {**row, "absent": {"case": str(reason)}}
        return
    calls = problem.calls if name == "forward" else _backward_calls(problem)
    with torch.set_grad_enabled(name == "backward"):
        times = in_turn(calls, settings.rounds)
    yield {**row, **timing_row(times), "absent": problem.absent}


def _backward_calls(problem: Problem) -> dict[str, Callable[[], Any]]:
    """Every library's backward pass, and our forward pass to compare with."""
    calls: dict[str, Callable[[], Any]] = {}
    for name, call in problem.calls.items():
        output = call()
        if output.requires_grad:
            calls[name] = _backward_of(output, problem.leaves)
        else:
            problem.absent[name] = "has no backward pass"
    calls["forward"] = torch.no_grad()(problem.calls["ours"])
    return calls


def _backward_of(output: Tensor, leaves: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    return partial(
        torch.autograd.grad,
        output,
        leaves,
        torch.randn_like(output),
        retain_graph=True,
        allow_unused=True,
    )


def _threads(case: Case, settings: Settings) -> Iterator[Row]:
    """Our time on 1, 2 (and all) threads, and whether the results are the same bits."""
    problem = case.build()
    counts = sorted({1, 2, settings.threads})
    reference = _results(problem, 1)
    equal = all(
        all(map(torch.equal, reference, _results(problem, count))) for count in {*counts, 3}
    )
    output = problem.calls["ours"]()
    passes: dict[str, Callable[[], object]] = {
        "forward": torch.no_grad()(problem.calls["ours"]),
        "backward": _backward_of(output, problem.leaves),
    }
    for name, call in passes.items():
        calls = {_count(n): partial(_on_threads, n, call) for n in reversed(counts)}
        row = timing_row(in_turn(calls, settings.rounds))
        times = row["times"]
        pairs = zip(times["1 thread"]["runs"], times["2 threads"]["runs"], strict=False)
        row["figures"]["1 thread / 2 threads"] = statistics.median(a / b for a, b in pairs)
        row["figures"]["bits equal"] = float(equal)
        yield {"case": f"{case.name}, {name}", "description": case.description, **row}
    torch.set_num_threads(settings.threads)


def _count(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def _on_threads(count: int, call: Callable[[], object]) -> object:
    torch.set_num_threads(count)
    return call()


def _results(problem: Problem, threads: int) -> list[Tensor]:
    """The output and all gradients."""
    torch.set_num_threads(threads)
    output = problem.calls["ours"]()
    grad_output = torch.ones_like(output)
    return [output.detach(), *torch.autograd.grad(output, problem.leaves, grad_output)]


def _growth(series: Series, settings: Settings) -> Iterator[Row]:
    """Our time at every size, in turn, and the exponent that fits best."""
    problems = {factor: case.build() for factor, case in series.cases.items()}
    ours: dict[int, Call] = {factor: problem.calls["ours"] for factor, problem in problems.items()}
    for name in PASSES:
        calls: dict[str, Callable[[], object]] = {}
        for factor, call in ours.items():
            if name == "forward":
                calls[f"{factor}x"] = torch.no_grad()(call)
            else:
                calls[f"{factor}x"] = _backward_of(call(), problems[factor].leaves)
        row = timing_row(in_turn(calls, settings.rounds))
        medians = [found["median"] for found in row["times"].values()]
        yield {
            "case": f"{series.name}, {name}",
            "description": next(iter(series.cases.values())).description + " at 1x",
            "times": row["times"],
            "work": list(ours),
            "figures": {"exponent": _slope(list(ours), medians)},
        }


def _slope(work: list[int], times: list[float]) -> float:
    """Of the logarithms, by least squares."""
    x, y = [math.log(value) for value in work], [math.log(value) for value in times]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def _memory(operator: Operator, series: Series, settings: Settings) -> Iterator[Row]:
    """Peaks of every size for all threads, ours also per thread."""
    rows: dict[tuple[int, str], Row] = {}
    try:
        for found in measure_memory(operator, series, settings.threads, settings.quick):
            row = rows.setdefault(
                (found["factor"], found["pass"]),
                {
                    "case": f"{found['case']}, {found['pass']}",
                    "series": series.name,
                    "factor": found["factor"],
                    "pass": found["pass"],
                    "megabytes": {},
                    "absent": {},
                    "figures": {},
                },
            )
            if "absent" in found:
                row["absent"][found["peer"]] = found["absent"]
            elif "megabytes" in found:
                row["megabytes"][found["peer"]] = found["megabytes"]
    except Absent as reason:
        yield {"case": series.name, "absent": {"case": str(reason)}, "figures": {}}
        return
    smallest = min(series.cases)
    for (factor, name), row in rows.items():
        ours = row["megabytes"]["ours"]
        row["figures"]["ours, MB a thread"] = ours / settings.threads
        if factor != smallest:
            beyond = ours - rows[smallest, name]["megabytes"]["ours"]
            row["figures"]["ours, MB beyond the smallest"] = beyond
        yield row
