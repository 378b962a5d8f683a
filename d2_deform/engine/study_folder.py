"""What the folder of a study says to others: how its runs were made, and what they gave."""

import csv
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from d2_deform.analysis.ablation_report import Results
from d2_deform.engine.ablation_runs import figures_by_row
from d2_deform.engine.defaults import ConfigError

__all__ = ["StudyFolder", "check_same_but_data", "differing_settings", "read_study"]


@dataclass(frozen=True)
class StudyFolder:
    """A study as far as it has come.

    Attributes:
        folder: where it lies.
        settings: its settings.json: "method", "data", "processes", "config", "rows".
        results: the figures of the runs that are done.
    """

    folder: str
    settings: Mapping[str, Any]
    results: Results


def read_study(folder: str) -> StudyFolder:
    """Reads settings.json and runs.csv of a study's folder; nothing else need be there.

    Raises:
        ConfigError: one of them is missing, or is not what the runner of ablations writes.
    """
    settings = _read(os.path.join(folder, "settings.json"), _parse_settings)
    runs = _read(os.path.join(folder, "runs.csv"), _parse_runs)
    return StudyFolder(folder, settings, figures_by_row(runs))


def _read(path: str, parse: Callable[[IO[str]], Any]) -> Any:
    try:
        with open(path, newline="") as file:
            return parse(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            f"{path}: there is no such file; expected a folder that tools/run_ablation.py made."
        ) from error
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise ConfigError(
            f"{path} cannot be read as tools/run_ablation.py writes it: {error}."
        ) from error


def _parse_settings(file: IO[str]) -> dict[str, Any]:
    found = json.load(file)
    parts = ("method", "data", "processes", "config", "rows")
    _check_names(found, parts)
    return {part: found[part] for part in parts}


def _parse_runs(file: IO[str]) -> list[dict[str, Any]]:
    lines = csv.DictReader(file)
    if lines.fieldnames:  # none before the first run is done
        _check_names(lines.fieldnames, ("row", "seed"))
    return [
        {
            "row": line["row"],
            "seed": int(line["seed"]),
            "figures": {key: float(cell) for key, cell in line.items() if "/" in key and cell},
        }
        for line in lines
    ]


def _check_names(found: Collection[str], wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")


def differing_settings(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> list[tuple[str, Any, Any]]:
    """The settings that two studies differ in: key, value before, value now.

    A key that only one of them knows came with another version and is no difference.
    """
    found = [
        (part, before[part], now[part])
        for part in ("method", "data", "processes")
        if before.get(part, now[part]) != now[part]
    ]
    for part in ("config", "rows"):
        old, new = before.get(part, {}), now[part]
        found += [(key, old[key], new[key]) for key in new if old.get(key, new[key]) != new[key]]
    return found


def check_same_but_data(
    studies: Sequence[StudyFolder], rows: Sequence[str], figures: Sequence[str]
) -> None:
    """Checks that studies may stand beside each other.

    Args:
        studies: some.
        rows: names of the rows that matter.
        figures: keys of the figures that matter.

    Raises:
        ConfigError: two differ in more than their data, one has no run of a row, or a run lacks a
            figure.
    """
    for study in studies:
        _check_settings(study, studies[0], rows)
    for study in studies:
        for row in rows:
            runs = study.results.get(row)
            if not runs:
                there = ", ".join(study.results) or "none"
                raise ConfigError(
                    f"--rows {row}: {study.folder} has no finished run of it; rows with runs: "
                    f"{there}."
                )
            for seed, found in runs.items():
                for key in figures:
                    if key not in found:
                        raise ConfigError(f"{study.folder}: {row} seed {seed} has no figure {key}.")


def _check_settings(study: StudyFolder, first: StudyFolder, rows: Sequence[str]) -> None:
    of_other_rows = set(study.settings["rows"]) - set(rows)
    differences = [
        f"{key} is {new}, {old} in {first.folder}"
        for key, old, new in differing_settings(first.settings, study.settings)
        if key != "data" and not key.startswith("DATASETS.") and key not in of_other_rows
    ]
    if differences:
        more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
        raise ConfigError(
            f"{study.folder}: {differences[0]}{more}; studies that are compared may differ in "
            "their data alone."
        )
