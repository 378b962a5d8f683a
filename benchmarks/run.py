"""All benchmarks, one after another, each in a process of its own; what ``make benchmark`` calls.

    python -m benchmarks.run [--threads 2] [--quick] [--only deform_conv2d networks]
        [--output FOLDER] [--page docs/benchmarks/cpu.md]

Ten minutes on 2 cores, one with --quick. Nothing else should run beside it. ``--page`` also writes
the tables of what lies in the output folder between the markers of a Markdown page; ``--only``
with nothing behind it measures nothing and does just that.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common.script import add_arguments, output_folder
from benchmarks.common.tables import goals_table, machine_list, part_table, summary

SCRIPTS = ("deform_conv2d", "deform_roi_pool", "deform_ps_roi_pool", "networks")
ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results: written by benchmarks/run.py -->", "<!-- end of results -->"


def report(folder: Path, beside: Path) -> str:
    """All results of a folder as Markdown.

    Args:
        folder: with the scripts' JSON files and plots.
        beside: folder of the page, which links start from.
    """
    found = [json.loads(path.read_text()) for path in json_files(folder)]
    goals = [goal for data in found for part in data["parts"].values() for goal in part["goals"]]
    sections = []
    for data in found:
        sections.append(f"## {data['benchmark']}\n\n{machine_list(data)}")
        for name, part in data["parts"].items():
            head = f"### {data['benchmark']}: {name}\n\n{part['measured']}, {part['commit']}"
            sections.append(f"{head}\n\n{part_table(name, part)}")
        for plot in sorted(folder.glob(f"{data['benchmark']}_*.png")):
            sections.append(f"![{plot.stem}]({os.path.relpath(plot, beside)})")
    judged = f"## Goals: {summary(goals)}\n\n{goals_table(goals)}" if goals else ""
    return "\n\n".join([judged, *sections]).strip()


def json_files(folder: Path) -> list[Path]:
    paths = (folder / f"{script}.json" for script in SCRIPTS)
    return [path for path in paths if path.exists()]


def fill_page(page: Path, text: str) -> None:
    """Replaces what is between the page's markers."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"--page {page}: it has no lines {BEGIN!r} and {END!r}")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def measure(scripts: list[str], args: argparse.Namespace, folder: Path) -> list[str]:
    """Runs the scripts.

    Returns:
        Names of those that failed.
    """
    options: list[Any] = ["--threads", args.threads, "--output", folder.resolve()]
    failed = []
    for i, script in enumerate(scripts):
        print(f"== {script} ({i + 1} of {len(scripts)})", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", f"benchmarks.{script}", *options]
        command += ["--quick"] * args.quick
        if subprocess.run([str(word) for word in command], cwd=ROOT).returncode:
            failed.append(script)
    return failed


def main() -> None:
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument(
        "--only", nargs="*", choices=SCRIPTS, default=list(SCRIPTS), help="(default: all)"
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="a page to put the tables into")
    args = parser.parse_args()
    folder = output_folder(args)
    start = time.monotonic()
    failed = measure(args.only, args, folder)
    report_path = folder / "report.md"
    if args.page:
        fill_page(args.page, report(folder, args.page.parent))
    else:
        report_path.write_text(report(folder, folder) + "\n")
    data = [json.loads(path.read_text()) for path in json_files(folder)]
    goals = [goal for d in data for part in d["parts"].values() for goal in part["goals"]]
    told = summary(goals) if goals else "goals not judged (--quick)"
    minutes = (time.monotonic() - start) / 60
    print(
        f"benchmark: {told}; {minutes:.1f} min; tables in {args.page or report_path}, JSON and "
        f"plots in {folder}" + (f"; FAILED: {', '.join(failed)}" if failed else "")
    )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
