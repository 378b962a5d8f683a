"""Results as pictures."""

from pathlib import Path
from typing import Any

from .problem import Absent
from .tables import three_digits

__all__ = ["draw"]

Row = dict[str, Any]
COLOURS = {
    "ours": "#1b6ca8",
    "torchvision": "#d1603d",
    "onnxruntime": "#7a9e3f",
    "dense": "#8a8a8a",
    "deformable": "#1b6ca8",
    "plain": "#8a8a8a",
}
MEMORY_GOAL = 8  # MB a thread
SMALLEST = 0.1  # MB; a logarithmic axis has no room for nothing


def draw(data: dict[str, Any], folder: Path) -> list[Path]:
    """Draws what the results have: bars of times, growth, memory.

    Returns:
        The PNG files.

    Raises:
        Absent: matplotlib is not there.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise Absent("matplotlib is not installed: no plots") from error
    matplotlib.use("Agg")
    parts: dict[str, list[Row]] = {name: part["rows"] for name, part in data["parts"].items()}
    others = ("threads", "growth", "memory", "profile")
    bars = {name: rows for name, rows in parts.items() if name not in others}
    memory = [row for row in parts.get("memory", []) if "megabytes" in row]
    figures = {}
    if bars:
        figures["times"] = _bars(bars, data)
    if "growth" in parts:
        figures["growth"] = _growth(parts["growth"], data)
    if memory:
        figures["memory"] = _memory(memory, data)
    files = []
    for name, figure in figures.items():
        files.append(folder / f"{data['benchmark']}_{name}.png")
        figure.savefig(files[-1], dpi=110)
        matplotlib.pyplot.close(figure)
    return files


def _subject(data: dict[str, Any]) -> str:
    threads = data["settings"]["threads"]
    return f"{data['benchmark']}, {threads} thread{'s' * (threads > 1)}"


def _bars(parts: dict[str, list[Row]], data: dict[str, Any]) -> Any:
    """One plot a part, one group of bars a case."""
    import matplotlib.pyplot as plt

    count = max(len(rows) for rows in parts.values())
    size = (max(7.0, 1.5 + 1.05 * count), 3.6 * len(parts) + 0.6)
    figure, axes = plt.subplots(len(parts), 1, figsize=size, squeeze=False, layout="constrained")
    figure.suptitle(f"{_subject(data)}: ms, median")
    for axis, (part, rows) in zip(axes[:, 0], parts.items(), strict=True):
        rows = [row for row in rows if "times" in row]
        names = [name for name in COLOURS if any(name in row["times"] for row in rows)]
        width = 0.85 / len(names)
        crowded = len(names) * len(rows) > 12
        values = []
        for i, name in enumerate(names):
            drawn = [(j, row["times"][name]) for j, row in enumerate(rows) if name in row["times"]]
            values += [times["median"] for _, times in drawn]
            bars = axis.bar(
                [j + (i - (len(names) - 1) / 2) * width for j, _ in drawn],
                [times["median"] for _, times in drawn],
                width,
                color=COLOURS[name],
                label=name,
            )
            labels = [three_digits(times["median"]) for _, times in drawn]
            axis.bar_label(bars, labels, fontsize=7, rotation=90 if crowded else 0, padding=2)
        logarithmic = max(values) > 5 * min(values)
        if logarithmic:
            axis.set_yscale("log")
        axis.margins(y=0.25)
        axis.set_xlim(-0.6, len(rows) - 0.4)
        axis.set_ylabel(f"{part}, logarithmic" if logarithmic else part)
        cases = [
            row["case"].replace(", ", ",\n").replace(" channels-last", "\nchannels-last")
            for row in rows
        ]
        axis.set_xticks(range(len(rows)), cases, fontsize=7)
        axis.legend(
            loc="lower right", bbox_to_anchor=(1, 1), fontsize=8, ncols=len(names), frameon=False
        )
    return figure


def _growth(rows: list[Row], data: dict[str, Any]) -> Any:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    series = list(dict.fromkeys(row["case"].partition(",")[0] for row in rows))
    for row in rows:
        name, _, direction = row["case"].partition(", ")
        medians = [statistics["median"] for statistics in row["times"].values()]
        axis.loglog(
            row["work"],
            medians,
            "o-" if direction == "forward" else "s--",
            color=f"C{series.index(name)}",
            label=f"{row['case']}: exponent {row['figures']['exponent']:.3f}",
        )
        axis.loglog(
            row["work"], [medians[0] * x for x in row["work"]], ":", color="grey", linewidth=1
        )
    axis.plot([], [], ":", color="grey", label="linear from 1x")
    axis.set_xticks(rows[0]["work"], [f"{x}x" for x in rows[0]["work"]])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.set(xlabel="work", ylabel="ms, median", title=f"{_subject(data)}: time against work")
    axis.legend(fontsize=8)
    return figure


def _memory(rows: list[Row], data: dict[str, Any]) -> Any:
    import matplotlib.pyplot as plt

    series = list(dict.fromkeys(row["series"] for row in rows))
    size = (5 * len(series), 4.5)
    figure, axes = plt.subplots(
        1, len(series), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    figure.suptitle(f"{_subject(data)}: peak beyond inputs and outputs")
    for axis, name in zip(axes[0], series, strict=True):
        for direction, style in (("forward", "o-"), ("backward", "s--")):
            chosen = [row for row in rows if (row["series"], row["pass"]) == (name, direction)]
            for peer in dict.fromkeys(peer for row in chosen for peer in row["megabytes"]):
                points = [
                    (row["factor"], row["megabytes"][peer])
                    for row in chosen
                    if peer in row["megabytes"]
                ]
                values = [max(value, SMALLEST) for _, value in points]
                axis.loglog(
                    [x for x, _ in points],
                    values,
                    style,
                    color=COLOURS[peer],
                    label=f"{peer}, {direction}",
                )
        factors = list(dict.fromkeys(row["factor"] for row in rows if row["series"] == name))
        goal = MEMORY_GOAL * data["settings"]["threads"]
        axis.axhline(goal, color="black", linestyle=":", linewidth=1, label=f"goal: {goal} MB")
        axis.set_xticks(factors, [f"{x}x" for x in factors])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.set_xlabel(name)
    axes[0, 0].set_ylabel(f"MB, all threads (less than {SMALLEST} as {SMALLEST})")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8
    )
    return figure
