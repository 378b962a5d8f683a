"""What the benchmarks are held to."""

import re
from dataclasses import dataclass
from typing import Any

__all__ = ["GOALS", "Goal", "judge", "verdict"]


@dataclass(frozen=True)
class Goal:
    """A limit for one figure of every row whose case matches.

    Attributes:
        benchmark, part: where the rows stand.
        cases: regular expression that the row's whole case matches.
        figure: of the row, e.g. "ours / dense".
        at_most, at_least: the limit, one of them.
    """

    benchmark: str
    part: str
    cases: str
    figure: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def limit(self) -> str:
        return f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"

    def is_met(self, value: float) -> bool:
        if self.at_most is not None:
            return value <= self.at_most
        return self.at_least is not None and value >= self.at_least


CONV, ROI, PS_ROI = "deform_conv2d", "deform_roi_pool", "deform_ps_roi_pool"
FORWARD, BACKWARD = "forward", "backward"
RES5 = r"res5( channels-last)?"
OTHER = r"(?!res5|depthwise|bfloat16).*"

GOALS = [
    Goal(CONV, FORWARD, RES5, "ours / dense", at_most=1.15),
    Goal(CONV, FORWARD, RES5, "onnxruntime / ours", at_least=1),
    Goal(CONV, FORWARD, RES5, "torchvision / ours", at_least=4),
    Goal(CONV, BACKWARD, RES5, "ours / dense", at_most=1.2),
    Goal(CONV, BACKWARD, RES5, "torchvision / ours", at_least=12),
    Goal(CONV, FORWARD, "res5 v2", "ours / v1", at_most=1.05),
    Goal(CONV, BACKWARD, "res5 v2", "ours / v1", at_most=1.05),
    Goal(CONV, FORWARD, OTHER, "ours / dense", at_most=1.5),
    Goal(CONV, FORWARD, OTHER, "torchvision / ours", at_least=1),
    Goal(CONV, BACKWARD, OTHER, "torchvision / ours", at_least=1),
    Goal(CONV, FORWARD, "depthwise", "torchvision / ours", at_least=5),
    Goal(CONV, BACKWARD, "depthwise", "torchvision / ours", at_least=5),
    Goal(CONV, FORWARD, "bfloat16", "float32 / ours", at_least=2.5),
    Goal(ROI, FORWARD, ".*", "ours, ms", at_most=8),
    Goal(ROI, FORWARD, ".*", "torchvision / ours", at_least=10),
    Goal(ROI, BACKWARD, ".*", "ours / forward", at_most=3),
    Goal(PS_ROI, FORWARD, ".*", "torchvision / ours", at_least=10),
    Goal(PS_ROI, BACKWARD, ".*", "torchvision / ours", at_least=10),
    *(
        goal
        for operator in (CONV, ROI, PS_ROI)
        for goal in (
            Goal(operator, "threads", ".*", "1 thread / 2 threads", at_least=1.8),
            Goal(operator, "threads", ".*", "bits equal", at_least=1),
            Goal(operator, "growth", ".*", "exponent", at_most=1.05),
            Goal(operator, "memory", ".*", "ours, MB a thread", at_most=8),
            # Independent of batch and resolution: what the largest takes beyond the smallest
            Goal(operator, "memory", ".*", "ours, MB beyond the smallest", at_most=1),
        )
    ),
    Goal("networks", "R-50", ".*", "deformable / plain", at_most=1.1),
    Goal("networks", "R-101", ".*", "deformable / plain", at_most=1.1),
]


def judge(benchmark: str, part: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Holds a row to the goals.

    Returns:
        For each goal that the row has the figure for: benchmark, part, case, figure, limit, value
        and whether it is met; or, in place of value and met, "absent", the reason.
    """
    verdicts = []
    for goal in GOALS:
        if (goal.benchmark, goal.part) != (benchmark, part):
            continue
        if not re.fullmatch(goal.cases, row["case"]):
            continue
        judged = {
            "benchmark": benchmark,
            "part": part,
            "case": row["case"],
            "figure": goal.figure,
            "limit": goal.limit,
        }
        value = row.get("figures", {}).get(goal.figure)
        reasons = row.get("absent", {})
        missing = [name for name in reasons if name in ("case", *goal.figure.split(" / "))]
        if value is not None:
            verdicts.append({**judged, "value": value, "met": goal.is_met(value)})
        elif missing:
            verdicts.append({**judged, "absent": reasons[missing[0]]})
    return verdicts


def verdict(judged: dict[str, Any]) -> str:
    """In words: "1.47, not met"."""
    if "absent" in judged:
        return f"not judged: {judged['absent']}"
    return f"{judged['value']:.3g}, {'met' if judged['met'] else 'NOT met'}"
