"""The command line that every script has."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .load import OtherLoad
from .parts import PARTS, Row, Settings, Step, operator_steps
from .plots import draw
from .problem import Absent, Operator
from .results import Results
from .tables import goals_table, machine_list, part_table, summary

__all__ = ["add_arguments", "operator_main", "output_folder", "run_steps", "settings_of"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="(default: torch's, %(default)s)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, two rounds; goals are not judged"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="for JSON and plots (default: output/benchmarks; with --quick its quick/)",
    )


def output_folder(args: argparse.Namespace) -> Path:
    if args.output is not None:
        return args.output
    return Path("output/benchmarks/quick" if args.quick else "output/benchmarks")


def settings_of(args: argparse.Namespace, rounds: int) -> Settings:
    """Sets the number of threads, too."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return Settings(args.threads, 2 if args.quick else rounds, args.quick)


def get_parser(doc: str, parts: Sequence[str]) -> argparse.ArgumentParser:
    head, _, rest = doc.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument(
        "--parts", nargs="+", choices=parts, default=list(parts), help="(default: all)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="(default: <script>.json in the output folder)"
    )
    return parser


def operator_main(
    build: Callable[[bool], Operator], doc: str, argv: Sequence[str] | None = None
) -> None:
    """A whole script of one operator."""
    args = get_parser(doc, PARTS).parse_args(argv)
    operator = build(args.quick)
    settings = settings_of(args, rounds=9)
    steps = operator_steps(operator, settings, args.parts)
    run_steps(operator.name, steps, settings, output_folder(args), args.json)


def run_steps(
    benchmark: str, steps: Sequence[Step], settings: Settings, folder: Path, json: Path | None
) -> None:
    """Measures all steps; prints, writes and draws what was found."""
    results = Results(json or folder / f"{benchmark}.json", benchmark, settings)
    print(f"{benchmark}\n{machine_list(results.data)}", flush=True)
    start, done, total = time.monotonic(), 0.0, sum(step.cost for step in steps)
    for part in dict.fromkeys(step.part for step in steps):
        rows: list[Row] = []
        load = OtherLoad()
        for step in (step for step in steps if step.part == part):
            left = "?"
            if done:
                left = _duration((time.monotonic() - start) / done * (total - done))
            print(f"  {part}: {step.label} (about {left} left)", file=sys.stderr, flush=True)
            rows += step.run()
            done += step.cost
        results.write(part, rows, load.share())
        print(f"\n{part}\n\n{part_table(part, results.data['parts'][part])}\n", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        plots = draw(results.data, folder)
    except Absent as reason:
        plots = []
        print(reason)
    if results.goals:
        print(goals_table(results.goals) + "\n")
        told = summary(results.goals)
    else:
        told = "goals not judged"
    places = ", ".join(str(path) for path in [results.path, *plots])
    print(f"{benchmark}: {told}, {_duration(time.monotonic() - start)}; {places}", flush=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
