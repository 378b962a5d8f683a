"""The results of ``benchmarks.cuda`` as Markdown, and what they are held to."""

import re
from typing import Any

from benchmarks.common.goals import Goal

from .case import PRECISIONS

__all__ = ["judge", "report"]

FORWARD, BACKWARD = "convolution forward", "convolution backward"
GOALS = [
    Goal("cuda", FORWARD, ".*", "torchvision / ours", at_least=3),
    Goal("cuda", BACKWARD, ".*", "torchvision / ours", at_least=3),
    Goal("cuda", FORWARD, "res5, batch 8, bf16", "ours / dense", at_most=1.5),
    Goal("cuda", FORWARD, "res5, batch 8, bf16", "ours / dense channels-last", at_most=1.5),
    Goal("cuda", BACKWARD, "res5, batch 8, bf16", "ours / dense", at_most=1.5),
    Goal("cuda", BACKWARD, "res5, batch 8, bf16", "ours / dense channels-last", at_most=1.5),
    Goal("cuda", "pooling forward", ".*", "torchvision / ours", at_least=5),
    Goal("cuda", "pooling backward", ".*", "torchvision / ours", at_least=5),
]


def judge(part: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Every goal that the row has the figure for."""
    return [
        {
            "part": part,
            "case": row["case"],
            "figure": goal.figure,
            "limit": goal.limit,
            "value": row["figures"][goal.figure],
            "met": goal.is_met(row["figures"][goal.figure]),
        }
        for goal in GOALS
        if goal.part == part
        and re.fullmatch(goal.cases, row["case"])
        and goal.figure in row["figures"]
    ]


def report(data: dict[str, Any]) -> str:
    """Machine, goals that are not met, and a table for each part."""
    peak = data["peaks"]
    products = ", ".join(f"{name} {peak[name] / 1e12:.0f}" for name in PRECISIONS)
    machine = data["machine"]
    lines = [
        f"{data['measured']}, commit {data['commit']}: "
        + ", ".join(f"{name} {value}" for name, value in machine.items())
        + f". In the same run a product reaches {products} TFLOP/s, a copy "
        f"{peak['bandwidth'] / 1e12:.2f} TB/s.",
    ]
    goals = data["goals"]
    if goals:
        lines += ["", f"Goals: {sum(goal['met'] for goal in goals)} of {len(goals)} met. Not met:"]
        missed = [goal for goal in goals if not goal["met"]]
        lines += [""] + [
            f"- {g['part']}, {g['case']}: {g['figure']} = {g['value']:.2f}, goal {g['limit']}"
            for g in missed
        ]
    for part, rows in data["parts"].items():
        lines += ["", f"### {part}", "", *_table(rows)]
        absent = {f"- {name}: {why}" for row in rows for name, why in row["absent"].items()}
        lines += ["", *sorted(absent)] if absent else []
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Medians of every library; of ours also with Python, the floor, and its share of ours."""
    names = list(dict.fromkeys(name for row in rows for name in row["times"]))
    head = [
        "case",
        *(f"{name}, ms" for name in names),
        "ours with Python, ms",
        "floor, ms",
        "share",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        times = row["times"]
        cells = [f"{times[name]['median']:.3f}" if name in times else "" for name in names]
        cells.append(f"{times['ours']['host']:.3f}" if "ours" in times else "")
        cells += [f"{row['floor']:.3f}", f"{row['share']:.0%}" if row["share"] else ""]
        lines.append(f"| {row['case']} | {' | '.join(cells)} |")
    return lines
