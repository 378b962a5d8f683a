"""Studies on several data sets beside each other: how a row's gain changes from one to the next."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tabulate import tabulate  # type: ignore[import-untyped]

from d2_deform.analysis.ablation import Metric, Row
from d2_deform.analysis.ablation_report import (
    Comparison,
    Estimate,
    Results,
    compare_rows,
    draw_comparison,
    estimate_cells,
    estimate_texts,
    to_csv,
)

__all__ = [
    "StudyLine",
    "compare_studies",
    "draw_studies",
    "find_missing_runs",
    "format_studies_csv",
    "format_studies_markdown",
]


@dataclass(frozen=True)
class StudyLine:
    """One row of one study by one metric.

    Attributes:
        study: its name.
        comparison: the row's figures and its gains over the study's plain network.
        growth: by seed, the gain minus that in the first study; empty in the first.
    """

    study: str
    comparison: Comparison
    growth: Mapping[int, float]


def compare_studies(
    studies: Mapping[str, Results], rows: Sequence[str], metrics: Sequence[Metric]
) -> list[StudyLine]:
    """Sets the same rows of several studies beside each other, seed by seed.

    Args:
        studies: the results of each by its name, in the order wanted.
        rows: names of rows, the plain network first.
        metrics: the figures to compare by.

    Returns:
        By metric, of each row by row, of each study by study.
    """
    named = [Row(name, name, {}) for name in rows]
    by_study = {name: compare_rows(named, metrics, studies[name]) for name in studies}
    lines = []
    for comparisons in zip(*by_study.values(), strict=True):
        first = comparisons[0].gains
        for study, comparison in zip(by_study, comparisons, strict=True):
            growth = {
                seed: gain - first[seed]
                for seed, gain in comparison.gains.items()
                if seed in first and comparison is not comparisons[0]
            }
            lines.append(StudyLine(study, comparison, growth))
    return lines


def find_missing_runs(studies: Mapping[str, Results], rows: Sequence[str]) -> list[str]:
    """A sentence for every row of a study that lacks seeds which others have."""
    seeds = {seed for results in studies.values() for row in rows for seed in results.get(row, {})}
    sentences = []
    for study, results in studies.items():
        for row in rows:
            missing = sorted(seeds - set(results.get(row, {})))
            if missing:
                numbers = ", ".join(map(str, missing))
                sentences.append(f"{study}: {row} has no finished run of seed {numbers}.")
    return sentences


def format_studies_markdown(title: str, lines: Sequence[StudyLine], notes: Sequence[str]) -> str:
    """The comparison for people, one section a metric, with `notes` at the end."""
    first = lines[0].study
    sections = [f"# {title}"]
    for metric in dict.fromkeys(line.comparison.metric for line in lines):
        table = [
            [
                line.comparison.row.name,
                line.study,
                str(len(line.comparison.values)),
                *estimate_texts(line.comparison.value),
                *estimate_texts(line.comparison.gain, "+"),
                *estimate_texts(_growth(line), "+"),
            ]
            for line in lines
            if line.comparison.metric == metric
        ]
        headers = ["row", "study", "runs", metric.name, "95 %", "gain", "95 %", "growth", "95 %"]
        text = tabulate(table, headers=headers, tablefmt="pipe", disable_numparse=True)
        sections.append(f"## {metric.name}\n\n{text}")
    sections.append(
        "Mean ± standard deviation over the runs of each row, one a seed, and the 95 % confidence "
        "interval of the mean (Student's t, from three runs on). Gain: minus the plain network's "
        f"of the same study and seed. Growth: the gain minus that in {first} with the same seed. "
        "Empty: too few runs."
    )
    return "\n\n".join([*sections, *notes]) + "\n"


def format_studies_csv(lines: Sequence[StudyLine]) -> str:
    """The comparison for programs: unrounded, empty where unknown."""
    cells: list[list[object]] = [
        [
            *("study", "row", "metric", "runs", "mean", "spread", "margin_95"),
            *("gain_runs", "gain_mean", "gain_spread", "gain_margin_95"),
            *("growth_runs", "growth_mean", "growth_spread", "growth_margin_95"),
        ]
    ]
    for line in lines:
        comparison = line.comparison
        cells.append(
            [
                *(line.study, comparison.row.name, comparison.metric.name),
                *estimate_cells(comparison.value),
                *estimate_cells(comparison.gain),
                *estimate_cells(_growth(line)),
            ]
        )
    return to_csv(cells)


def draw_studies(title: str, lines: Sequence[StudyLine]) -> bytes:
    """The comparison as a picture: every run a dot, figures on the left, gains on the right.

    Returns:
        A PNG.
    """
    comparisons = [
        replace(
            line.comparison,
            row=replace(line.comparison.row, title=f"{line.comparison.row.name}, {line.study}"),
        )
        for line in lines
    ]
    return draw_comparison(title, comparisons)


def _growth(line: StudyLine) -> Estimate | None:
    return Estimate.of(list(line.growth.values()))
