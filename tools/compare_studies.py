#!/usr/bin/env python
"""Set studies of tools/run_ablation.py beside each other: does the gain change with the data?

    python tools/compare_studies.py output/ablation/digits_warp0_deeplab \
        output/ablation/digits_deeplab output/ablation/digits_warp8_deeplab \
        --rows plain dconv3 --output output/strength

Each FOLDER is a study; all must have the same method and settings, and may differ in their data.
Every row is set beside the plain network of its own study, seed by seed. --output gets
comparison.md, .csv and .png.
"""

import argparse
import os
import sys

from d2_deform.analysis.ablation import find_study
from d2_deform.analysis.study_comparison import (
    compare_studies,
    draw_studies,
    find_missing_runs,
    format_studies_csv,
    format_studies_markdown,
)
from d2_deform.engine import ConfigError, write_new_file
from d2_deform.engine.study_folder import check_same_but_data, read_study
from d2_deform.visualization.training_curves import MetricsError, name_runs

PLAIN = "plain"


def get_parser() -> argparse.ArgumentParser:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="studies, two or more, in the order wanted"
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        metavar="NAME",
        help=f"compare these alone; {PLAIN} is always among them (default: all that the first "
        "study has run)",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the tables go")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    if len(args.folders) < 2:
        parser.error(f"FOLDER: {args.folders[0]} alone given, expected two studies or more")
    try:
        names = name_runs(args.folders)
    except MetricsError as error:
        raise ConfigError(str(error)) from error
    studies = [read_study(folder) for folder in args.folders]
    rows = list(dict.fromkeys([PLAIN, *(args.rows or studies[0].results)]))
    method = studies[0].settings["method"]
    try:
        metrics = find_study(method, studies[0].settings["data"]).metrics
    except ValueError as error:
        raise ConfigError(f"{args.folders[0]}: {error}") from error
    check_same_but_data(studies, rows, [metric.key for metric in metrics])

    results = {name: study.results for name, study in zip(names, studies, strict=True)}
    lines = compare_studies(results, rows, metrics)
    notes = find_missing_runs(results, rows)
    title = f"{method} on {', '.join(str(study.settings['data']) for study in studies)}"
    table = format_studies_markdown(title, lines, notes)
    stem = os.path.join(args.output, "comparison")
    write_new_file(f"{stem}.csv", format_studies_csv(lines).encode())
    write_new_file(f"{stem}.md", table.encode())
    write_new_file(f"{stem}.png", draw_studies(title, lines))
    print(f"{table}\nAll of it: {stem}.*")


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}; install it: pip install {error.name}")
