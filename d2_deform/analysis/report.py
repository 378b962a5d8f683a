"""All counts of one model together, as tables, as lines and as plain data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate  # type: ignore[import-untyped]
from torch import nn

from .parts import (
    ByPart,
    Inputs,
    activations_by_part,
    flops_by_part,
    parameters_by_part,
    runtime_by_part,
)

__all__ = ["TASKS", "Report", "analyze_model", "compare_reports"]


@dataclass(frozen=True)
class _Quantity:
    name: str
    unit: str
    scale: float  # of the unit


TASKS = {
    "parameter": _Quantity("parameters", "M", 1e6),
    "flop": _Quantity("FLOPs", "G", 1e9),
    "activation": _Quantity("activations", "M", 1e6),
    "runtime": _Quantity("forward time", "ms", 1e-3),
}


@dataclass
class Report:
    """What a model costs.

    Attributes:
        name: of the model.
        by_part: for each task asked for ("parameter", "flop", "activation", "runtime"; seconds),
            the value of each part, averaged over the inputs.
        num_proposals: how many boxes the second stage had to do with, averaged over the inputs;
            None where there is none or nothing was run.
    """

    name: str
    by_part: dict[str, ByPart] = field(default_factory=dict)
    num_proposals: float | None = None

    @property
    def total(self) -> dict[str, float]:
        """The sum over the parts for each task."""
        return {task: sum(values.values()) for task, values in self.by_part.items()}

    def as_dict(self) -> dict[str, Any]:
        """For JSON; runtime in seconds."""
        return {
            "name": self.name,
            "total": self.total,
            "by_part": self.by_part,
            "num_proposals": self.num_proposals,
        }

    def table(self) -> str:
        """A row for each part that has anything, a value and its share for each task."""
        headers = ["part"]
        for task in self.by_part:
            headers += [_header(task), "share"]
        rows = [
            [part, *(cell for task in self.by_part for cell in self._cells(task, part))]
            for part in _parts_with_anything([self], self.by_part)
        ]
        total = ["total"]
        for task, value in self.total.items():
            total += [_number(task, value), ""]
        return _table(headers, [*rows, total])

    def summary(self) -> str:
        """One line with the totals."""
        values = [_with_unit(task, value) for task, value in self.total.items()]
        if self.num_proposals is not None:
            values.append(f"{self.num_proposals:g} proposals")
        return f"{self.name}: {', '.join(values)}"

    def _cells(self, task: str, part: str) -> list[str]:
        value = self.by_part[task].get(part, 0)
        return [_number(task, value), f"{100 * value / self.total[task]:.1f} %" if value else ""]


def analyze_model(
    model: nn.Module,
    inputs: Inputs,
    tasks: Sequence[str] = tuple(TASKS),
    name: str = "model",
    num_runs: int = 5,
) -> Report:
    """Counts and measures a model on some pictures, one at a time.

    Args:
        model: in evaluation mode.
        inputs: a dict for each picture, as the model takes it (see ``prepare_input``).
        tasks: of "parameter", "flop", "activation" and "runtime".
        name: for the report.
        num_runs: of which the median run's time is taken, for each picture.
    """
    report = Report(name)
    proposals: list[int] = []
    generator = getattr(model, "proposal_generator", None)
    handles = []
    if generator is not None:
        handles.append(
            generator.register_forward_hook(
                lambda _, __, output: proposals.append(len(output[0][0]))
            )
        )
    counters: dict[str, Callable[[Inputs], ByPart]] = {
        "parameter": lambda _: parameters_by_part(model),
        "flop": lambda picture: flops_by_part(model, picture),
        "activation": lambda picture: activations_by_part(model, picture),
        "runtime": lambda picture: runtime_by_part(model, picture, num_runs),
    }
    try:
        for task in tasks:
            report.by_part[task] = _mean([counters[task]([picture]) for picture in inputs])
    finally:
        for handle in handles:
            handle.remove()
    proposals += [len(picture["proposals"]) for picture in inputs if "proposals" in picture]
    if proposals:
        report.num_proposals = sum(proposals) / len(proposals)
    return report


def compare_reports(one: Report, other: Report) -> tuple[str, str]:
    """Puts two models beside each other, for the tasks that both have.

    Returns:
        A table for each task, and one line with the differences of the totals.
    """
    tables, differences = [], []
    for task in one.by_part:
        if task not in other.by_part:
            continue
        headers = [_header(task), one.name, "share", other.name, "share", "difference"]
        rows = []
        for part in _parts_with_anything([one, other], [task]):
            difference = other.by_part[task].get(part, 0) - one.by_part[task].get(part, 0)
            cells = [*one._cells(task, part), *other._cells(task, part)]
            rows.append([part, *cells, _number(task, difference, "+")])
        before, after = one.total[task], other.total[task]
        change = _number(task, after - before, "+")
        rows.append(["total", _number(task, before), "", _number(task, after), "", change])
        tables.append(_table(headers, rows))
        relative = f" ({100 * (after - before) / before:+.1f} %)" if before else ""
        differences.append(_with_unit(task, after - before, "+") + relative)
    line = f"{other.name} against {one.name}: {', '.join(differences)}"
    if one.num_proposals is not None and other.num_proposals is not None:
        line += f"; {other.num_proposals:g} and {one.num_proposals:g} proposals"
    return "\n\n".join(tables), line


def _mean(values: Sequence[ByPart]) -> ByPart:
    if len(values) == 1:
        return values[0]  # whole numbers stay whole
    return {part: sum(one[part] for one in values) / len(values) for part in values[0]}


def _parts_with_anything(reports: Sequence[Report], tasks: Any) -> list[str]:
    """In the order of the modules; a part that only one model has goes behind the part before."""
    parts: list[str] = []
    for report in reports:
        place = 0
        for part in dict.fromkeys(part for task in tasks for part in report.by_part[task]):
            if part in parts:
                place = parts.index(part) + 1
            else:
                parts.insert(place, part)
                place += 1
    return [
        part
        for part in parts
        if any(report.by_part[task].get(part, 0) for report in reports for task in tasks)
    ]


def _header(task: str) -> str:
    return f"{TASKS[task].name} ({TASKS[task].unit})"


def _number(task: str, value: float, sign: str = "") -> str:
    if not value:
        return "0"
    decimals = 1 if task == "runtime" else 3
    return f"{value / TASKS[task].scale:{sign}.{decimals}f}"


def _with_unit(task: str, value: float, sign: str = "") -> str:
    return f"{_number(task, value, sign)} {TASKS[task].unit} {TASKS[task].name}"


def _table(headers: list[str], rows: list[list[str]]) -> str:
    alignment = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(rows, headers, tablefmt="pipe", colalign=alignment, disable_numparse=True)
