"""What a study's folder holds of its runs, and how long the rest will take.

::

    runs/<row>_seed<n>/           one run: Detectron2's OUTPUT_DIR
        output.log                all that it printed
        progress.json             how often it was started, how long it has worked
        result.json               its figures; it is there once the run is complete, and only then
"""

import glob
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from d2_deform.analysis.ablation import Row
from d2_deform.engine.whole_file import write_whole

__all__ = [
    "Run",
    "estimate_seconds_left",
    "figures_by_row",
    "read_json",
    "read_runs",
    "write_json",
]


def write_json(path: str, content: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n")


def read_json(path: str) -> dict[str, Any]:
    with open(path) as file:
        return json.load(file)


@dataclass(frozen=True)
class Run:
    """One row with one seed.

    Attributes:
        row, seed: which.
        folder: its OUTPUT_DIR.
        iterations: how many it takes.
    """

    row: Row
    seed: int
    folder: str
    iterations: int

    @property
    def name(self) -> str:
        return f"{self.row.name} seed {self.seed}"

    @property
    def is_done(self) -> bool:
        return os.path.exists(os.path.join(self.folder, "result.json"))

    def count_iterations(self) -> int:
        """How many iterations Detectron2 has written down so far."""
        records = self._records()
        return min(records[-1]["iteration"] + 1, self.iterations) if records else 0

    def read_figures(self, key: str) -> dict[str, Any] | None:
        """The figures of the evaluation at the end, where `key` is among them."""
        for record in reversed(self._records()):
            if key in record and record["iteration"] + 1 >= self.iterations:
                tasks = {name: value for name, value in record.items() if "/" in name}
                task = key.partition("/")[0]
                return {name: value for name, value in tasks.items() if name.startswith(task + "/")}
        return None

    def seconds_per_iteration(self) -> float | None:
        times = [record["time"] for record in self._records() if "time" in record]
        return median(times) if times else None

    def _records(self) -> list[dict[str, Any]]:
        """The lines of metrics.json; one that was cut off by a kill is left out."""
        records = []
        with suppress(FileNotFoundError), open(os.path.join(self.folder, "metrics.json")) as file:
            for line in file:
                with suppress(json.JSONDecodeError):
                    records.append(json.loads(line))
        return [record for record in records if "iteration" in record]


def read_runs(folder: str) -> list[dict[str, Any]]:
    """The result.json of every run of a study's folder that is done."""
    paths = glob.glob(os.path.join(glob.escape(folder), "runs", "*", "result.json"))
    return [read_json(path) for path in sorted(paths)]


def figures_by_row(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, dict[str, float]]]:
    """The figures of runs by row and seed."""
    figures: dict[str, dict[int, dict[str, float]]] = {}
    for run in runs:
        figures.setdefault(run["row"], {})[run["seed"]] = run["figures"]
    return figures


def estimate_seconds_left(
    done: Mapping[str, Sequence[float]], left: Sequence[str], spent: float, progress: float
) -> float | None:
    """How long the rest of a study will take, by the runs that are done.

    Args:
        done: the seconds that the finished runs of each row took.
        left: the rows of the runs that are not finished, that at work first.
        spent: seconds that the run at work has taken so far.
        progress: the share of its iterations that it has done, 0 to 1.

    Returns:
        Seconds. A row without a finished run is taken for as long as the mean of all that are
        known. None as long as nothing is known.
    """
    if not left:
        return 0.0
    means = {row: fmean(seconds) for row, seconds in done.items() if seconds}
    if left[0] not in means and progress > 0:
        means[left[0]] = spent / progress
    if not means:
        return None
    usual = fmean(means.values())
    seconds = [means.get(row, usual) for row in left]
    return max(seconds[0] - spent, 0.0) + sum(seconds[1:])
