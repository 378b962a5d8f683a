"""From the results of an ablation's runs to its table, as Markdown, CSV and a picture."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from tabulate import tabulate  # type: ignore[import-untyped]

from d2_deform.analysis.ablation import Metric, Row, Study

__all__ = [
    "Comparison",
    "Estimate",
    "Results",
    "compare_rows",
    "draw_comparison",
    "estimate_cells",
    "estimate_texts",
    "format_csv",
    "format_markdown",
    "format_runs_csv",
    "to_csv",
]

# Of every row by name, of every seed, a run's figures by their keys
Results = Mapping[str, Mapping[int, Mapping[str, float]]]


@dataclass(frozen=True)
class Estimate:
    """What several runs say of one figure.

    Attributes:
        mean: of the runs.
        count: how many runs.
        spread: their standard deviation (that of a sample, over count - 1); None of one run.
        margin: half the width of the 95 % confidence interval of the mean by Student's t; None of
            fewer than three runs.
    """

    mean: float
    count: int
    spread: float | None
    margin: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate | None":
        """The estimate from some runs; None of none."""
        if not values:
            return None
        count = len(values)
        spread = stdev(values) if count > 1 else None
        margin = None
        if spread is not None and count >= 3:
            from scipy.special import stdtrit  # only here, so that all else goes without SciPy

            margin = float(stdtrit(count - 1, 0.975)) * spread / math.sqrt(count)
        return cls(fmean(values), count, spread, margin)

    def text(self, sign: str = "") -> str:
        """ "61.52 ± 0.40", with a "+" before a gain where `sign` is "+"."""
        spread = "" if self.spread is None else f" ± {self.spread:.2f}"
        return f"{self.mean:{sign}.2f}{spread}"

    def interval(self, sign: str = "") -> str:
        """ "60.53 to 62.51", or nothing."""
        if self.margin is None:
            return ""
        return f"{self.mean - self.margin:{sign}.2f} to {self.mean + self.margin:{sign}.2f}"


@dataclass(frozen=True)
class Comparison:
    """One row by one metric.

    Attributes:
        row, metric: which.
        values: the figure of every run, by seed.
        gains: the same minus the plain network's with the same seed, where both are there.
        value, gain: estimates of both; None without runs.
        paper, paper_gain: the paper's figure, and minus that of its plain network.
    """

    row: Row
    metric: Metric
    values: Mapping[int, float]
    gains: Mapping[int, float]
    paper: float | None
    paper_gain: float | None

    @property
    def value(self) -> Estimate | None:
        return Estimate.of(list(self.values.values()))

    @property
    def gain(self) -> Estimate | None:
        return Estimate.of(list(self.gains.values()))


def compare_rows(
    rows: Sequence[Row], metrics: Sequence[Metric], results: Results
) -> list[Comparison]:
    """Sets every row beside the first, seed by seed.

    The same seed is the same initial weights and the same order of pictures in both rows, so the
    difference is that of the pair.

    Args:
        rows: of a table, the plain network first.
        metrics: the figures to compare by.
        results: of the runs that are done; those of other rows are ignored.

    Returns:
        All rows by the first metric, then by the second, and so on.
    """
    plain = rows[0]
    comparisons = []
    for index, metric in enumerate(metrics):
        baseline = _figures(results, plain, metric)
        paper_baseline = plain.paper[index] if plain.paper else None
        for row in rows:
            values = _figures(results, row, metric)
            paper = row.paper[index] if row.paper else None
            is_plain = row is plain
            comparisons.append(
                Comparison(
                    row=row,
                    metric=metric,
                    values=values,
                    gains={
                        seed: value - baseline[seed]
                        for seed, value in values.items()
                        if seed in baseline and not is_plain
                    },
                    paper=paper,
                    paper_gain=(
                        None
                        if is_plain or paper is None or paper_baseline is None
                        else round(paper - paper_baseline, 1)
                    ),
                )
            )
    return comparisons


def _figures(results: Results, row: Row, metric: Metric) -> dict[int, float]:
    return {seed: run[metric.key] for seed, run in sorted(results.get(row.name, {}).items())}


def format_markdown(study: Study, table: int, comparisons: Sequence[Comparison]) -> str:
    """The table for people, one section a metric."""
    headers = ["row", "runs", "", "95 %", "gain", "95 %"]
    paper = f"paper ({study.paper_data})"
    sections = [f"# Table {table}: {study.method} on {study.data}"]
    for metric in dict.fromkeys(comparison.metric for comparison in comparisons):
        has_paper = metric.paper_index is not None
        lines = []
        for comparison in comparisons:
            if comparison.metric != metric:
                continue
            line = [
                comparison.row.title,
                str(len(comparison.values)),
                *estimate_texts(comparison.value),
                *estimate_texts(comparison.gain, "+"),
            ]
            if has_paper:
                line += [_show(comparison.paper), _show(comparison.paper_gain, "+")]
            lines.append(line)
        titles = [*headers, *([paper, "its gain"] if has_paper else [])]
        titles[2] = metric.name
        text = tabulate(lines, headers=titles, tablefmt="pipe", disable_numparse=True)
        sections.append(f"## {metric.name}\n\n{text}")
    sections.append(
        "Mean ± standard deviation over the runs of each row, one a seed, and the 95 % confidence "
        "interval of the mean (Student's t, from three runs on). Gain: minus the plain network's "
        "with the same seed. Empty: not run, or too few runs."
    )
    return "\n\n".join(sections) + "\n"


def estimate_texts(estimate: Estimate | None, sign: str = "") -> tuple[str, str]:
    """The mean with its spread, and its interval, both empty without runs; see `Estimate.text`."""
    return (estimate.text(sign), estimate.interval(sign)) if estimate else ("", "")


def _show(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.1f}"


def format_csv(comparisons: Sequence[Comparison]) -> str:
    """The table for programs: a line for each row and metric, unrounded, empty where unknown."""
    lines: list[list[object]] = [
        [
            *("row", "title", "metric", "runs", "mean", "spread", "margin_95"),
            *("gain_runs", "gain_mean", "gain_spread", "gain_margin_95", "paper", "paper_gain"),
        ]
    ]
    for comparison in comparisons:
        lines.append(
            [
                *(comparison.row.name, comparison.row.title, comparison.metric.name),
                *estimate_cells(comparison.value),
                *estimate_cells(comparison.gain),
                *(comparison.paper, comparison.paper_gain),
            ]
        )
    return to_csv(lines)


def estimate_cells(estimate: Estimate | None) -> list[object]:
    """Count, mean, spread and margin for `to_csv`."""
    if estimate is None:
        return [0, None, None, None]
    return [estimate.count, estimate.mean, estimate.spread, estimate.margin]


def format_runs_csv(runs: Sequence[Mapping[str, Any]]) -> str:
    """Every run with every figure of its evaluation, so that nothing hides behind a mean.

    Args:
        runs: as their result.json tells: "row", "seed", "figures", and whatever else, such as
            "seconds".
    """
    others = [key for key in dict.fromkeys(key for run in runs for key in run) if key != "figures"]
    keys = sorted({key for run in runs for key in run["figures"]})
    lines: list[list[object]] = [[*others, *keys]]
    for run in sorted(runs, key=lambda run: (run["row"], run["seed"])):
        figures = run["figures"]
        lines.append([*(run.get(key) for key in others), *(figures.get(key) for key in keys)])
    return to_csv(lines)


def to_csv(lines: Sequence[Sequence[object]]) -> str:
    """Lines of cells as CSV; None is an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def draw_comparison(title: str, comparisons: Sequence[Comparison], paper_data: str = "") -> bytes:
    """The table as a picture: figures on the left, gains beside the paper's on the right.

    Args:
        title: stands above.
        comparisons: all rows by the first metric, then by the second, and so on.
        paper_data: where the paper measured its figures, if they are there.

    Returns:
        A PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = list(dict.fromkeys(comparison.metric for comparison in comparisons))
    num_rows = len(comparisons) // len(metrics)
    height = len(metrics) * (0.36 * num_rows + 0.8) + 1.0
    figure = Figure(figsize=(12, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(metrics), 2, sharey=True, squeeze=False)
    for metric, (left, right) in zip(metrics, panels, strict=True):
        of_metric = [comparison for comparison in comparisons if comparison.metric == metric]
        right.axvline(0, color="0.6", linewidth=1)
        for position, comparison in enumerate(of_metric):
            _draw_runs(left, position, comparison.values, comparison.value)
            _draw_runs(right, position, comparison.gains, comparison.gain)
            if comparison.paper_gain is not None:
                right.plot(comparison.paper_gain, position, **_PAPER_STYLE)
        left.set_yticks(range(num_rows), [comparison.row.title for comparison in of_metric])
        left.set_ylim(num_rows - 0.5, -0.5)
        left.set_xlabel(metric.name)
        right.set_xlabel(f"gain in {metric.name} over the plain network")
        for panel in (left, right):
            panel.grid(axis="x", color="0.9")
            panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    labels = {
        "one run (one seed)": panels[0, 0].plot([], [], **_RUN_STYLE)[0],
        "mean, 95 % confidence interval from three runs on": panels[0, 0].plot(
            [], [], color=_COLOR, **_MEAN_STYLE
        )[0],
    }
    if any(comparison.paper_gain is not None for comparison in comparisons):
        name = f"the paper's gain ({paper_data}, ResNet-101)"
        labels[name] = panels[0, 0].plot([], [], **_PAPER_STYLE)[0]
    figure.legend(
        list(labels.values()), list(labels), loc="outside lower center", ncols=3, frameon=False
    )
    image = io.BytesIO()
    figure.savefig(image, dpi=110)
    return image.getvalue()


_COLOR = "#1d4ed8"
_RUN_STYLE: dict[str, Any] = {"marker": "o", "ls": "", "ms": 5, "color": "0.45", "mew": 0}
_MEAN_STYLE: dict[str, Any] = {"marker": "|", "ms": 13, "mew": 2.5, "ls": "-", "lw": 1.8}
_PAPER_STYLE: dict[str, Any] = {"marker": "D", "ls": "", "ms": 7, "mfc": "none", "color": "#c2410c"}


def _draw_runs(
    panel: Any, position: int, values: Mapping[int, float], estimate: Estimate | None
) -> None:
    if estimate is None:
        return
    panel.plot(list(values.values()), [position] * len(values), zorder=3, **_RUN_STYLE)
    if estimate.margin is not None:
        ends = (estimate.mean - estimate.margin, estimate.mean + estimate.margin)
        panel.plot(ends, (position, position), color=_COLOR, lw=1.8, solid_capstyle="butt")
    panel.plot(estimate.mean, position, color=_COLOR, **_MEAN_STYLE)
