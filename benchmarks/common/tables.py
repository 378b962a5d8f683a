"""Results as Markdown."""

from collections.abc import Iterable
from typing import Any

from .goals import verdict
from .load import ALLOWED

__all__ = ["goals_table", "machine_list", "part_table", "summary", "three_digits"]

Row = dict[str, Any]


def part_table(part: str, content: dict[str, Any]) -> str:
    """The table of one part, and under it what is absent and why."""
    rows = content["rows"]
    if any("megabytes" in row for row in rows):
        table = _memory_table(rows)
    elif part == "growth":
        table = _growth_table(rows)
    elif part == "profile":
        table = _profile_table(rows)
    else:
        table = _timing_table(rows, content["goals"])
    notes = dict.fromkeys(
        f"- {row['case'] if name == 'case' else name}: absent, {reason}"
        for row in rows
        for name, reason in row.get("absent", {}).items()
    )
    load = content["other load"]
    if load is not None and load > ALLOWED and part != "memory":
        notes[f"- other processes took {load:.0%} of the processor: do not trust these times"] = (
            None
        )
    return "\n".join([table, "", *notes]).rstrip()


def goals_table(goals: Iterable[dict[str, Any]]) -> str:
    """A row for each goal with the case that is farthest from it; those not met come first."""
    body = []
    for (benchmark, part, figure, limit), cases in _by_goal(goals).items():
        judged = [case for case in cases if "met" in case]
        if judged:
            farthest = max if limit.startswith("<=") else min
            worst = farthest(judged, key=lambda case: case["value"])
            met = sum(case["met"] for case in judged)
            found = f"{worst['value']:.3g} ({worst['case']})"
            told = ("met" if met == len(judged) else "NOT met") + f": {met} of {len(judged)}"
        else:
            found, told = cases[0]["absent"], "not judged"
        body.append([f"{benchmark}, {part}", figure, limit, found, told])
    body.sort(key=lambda line: line[-1].startswith("met"))
    return _markdown(["where", "figure", "goal", "farthest from it", "cases"], body)


def summary(goals: Iterable[dict[str, Any]]) -> str:
    """How many goals are met by all their cases."""
    grouped = [[case.get("met") for case in cases] for cases in _by_goal(goals).values()]
    judged = [cases for cases in grouped if any(met is not None for met in cases)]
    text = f"{sum(False not in cases for cases in judged)} of {len(judged)} goals met"
    others = len(grouped) - len(judged)
    return text + (f", {others} not judged" if others else "")


def _by_goal(goals: Iterable[dict[str, Any]]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    grouped: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for goal in goals:
        key = tuple(goal[name] for name in ("benchmark", "part", "figure", "limit"))
        grouped.setdefault(key, []).append(goal)
    return grouped


def machine_list(data: dict[str, Any]) -> str:
    """Machine, versions and settings of a result file."""
    machine, settings = data["machine"], data["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return "\n".join(
        [
            f"- {machine['processor']} (family, model, stepping "
            f"{machine['cpu family, model, stepping']}), {machine['cores']} cores; "
            f"{machine['instructions'] or 'no vector instructions that are looked for'}",
            f"- {machine['system']}, Python {machine['python']}, {versions}",
            f"- our kernels: {machine['kernels']}, build {machine['library']}",
            f"- {settings['threads']} threads, at most {settings['rounds']} rounds",
        ]
    )


def _timing_table(rows: list[Row], goals: list[dict[str, Any]]) -> str:
    """Median (minimum) of every call; beside the first, how many times its time."""
    names = list(dict.fromkeys(name for row in rows for name in row.get("times", {})))
    body = []
    for row in rows:
        times = row.get("times", {})
        reference = next(iter(times), "")
        cells = []
        for name in names:
            if name not in times:
                cells.append("")
                continue
            median, minimum = times[name]["median"], times[name]["minimum"]
            cell = f"{three_digits(median)} ({three_digits(minimum)})"
            if name != reference:
                cell += f" **{three_digits(row['figures'][f'{name} / {reference}'])}x**"
            cells.append(cell)
        if "bits equal" in row.get("figures", {}):
            cells.append("yes" if row["figures"]["bits equal"] else "NO")
        found = [
            f"{g['figure']} {g['limit']}: {verdict(g)}" for g in goals if g["case"] == row["case"]
        ]
        description = row.get("description", "")
        body.append([f"{row['case']}: {description}", *cells, "; ".join(found)])
    with_bits = any("bits equal" in row.get("figures", {}) for row in rows)
    columns = [f"{name}, ms" for name in names] + ["bits equal"] * with_bits
    return _markdown(["case", *columns, "goals"], body)


def _memory_table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.get("megabytes", {})))
    body = [
        [
            row["case"],
            *(_number(row["megabytes"].get(name)) for name in names),
            _number(row["figures"]["ours, MB a thread"]),
        ]
        for row in rows
        if "megabytes" in row
    ]
    return _markdown(["case", *(f"{name}, MB" for name in names), "ours, MB a thread"], body)


def _growth_table(rows: list[Row]) -> str:
    sizes = list(dict.fromkeys(name for row in rows for name in row["times"]))
    body = [
        [
            f"{row['case']} ({row['description']})",
            *(_number(row["times"].get(size, {}).get("median")) for size in sizes),
            f"{row['figures']['exponent']:.3f}",
        ]
        for row in rows
    ]
    return _markdown(["series", *(f"{size}, ms" for size in sizes), "exponent"], body)


def _profile_table(rows: list[Row]) -> str:
    (row,) = rows
    shares = ", ".join(f"{name} {share:.1%}" for name, share in row["shares"].items())
    body = [
        [op["name"], f"{op['share']:.1%}", f"{op['ms']:.1f}", str(op["calls"])] for op in row["top"]
    ]
    table = _markdown(["operation, its own time", "share", "ms", "calls"], body)
    return f"{row['case']}, {row['description']}: {shares}.\n\n{table}"


def three_digits(value: float) -> str:
    """Three of them count; no exponents."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _number(value: float | None) -> str:
    return "" if value is None else three_digits(value)


def _markdown(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
