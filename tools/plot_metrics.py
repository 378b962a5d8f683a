#!/usr/bin/env python
"""Draw the training curves of one run, or of several runs for comparison.

    python tools/plot_metrics.py output/a output/b --output curves.png
    python tools/plot_metrics.py output/a --output ap.pdf --keys total_loss "bbox/AP*"

A RUN is the folder that a training writes to (OUTPUT_DIR), or its metrics.json; the training may
still be running. Each metric has a panel, each run a line: the losses, the learning rate, what
evaluations gave (AP, AP50, mIoU, top1) and how far the deformable layers move their samples.
"""

import argparse
import os
import sys

from d2_deform.visualization.training_curves import (
    MetricsError,
    Run,
    choose_keys,
    draw_training_curves,
    name_runs,
    read_metrics,
)

SUFFIXES = (".png", ".pdf", ".svg", ".jpg")
SUMMED_UP = ("total_loss", "bbox/AP50", "sem_seg/mIoU", "classification/top1")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders or metrics.json files")
    parser.add_argument(
        "--output", required=True, metavar="FILE", help=f"the figure ({', '.join(SUFFIXES)})"
    )
    parser.add_argument(
        "--keys",
        nargs="+",
        default=[],
        metavar="KEY",
        help="which metrics to draw, names or patterns like 'offset/*'",
    )
    parser.add_argument(
        "--smoothing",
        type=_odd,
        default=9,
        metavar="N",
        help="average over so many written points, of 20 iterations each; odd, 1: not at all "
        "(default: %(default)s)",
    )
    return parser


def _odd(text: str) -> int:
    number = int(text)
    if number < 1 or number % 2 == 0:
        raise argparse.ArgumentTypeError(f"{text} given, expected 1, 3, 5, ...")
    return number


def check_output(path: str) -> None:
    if not path.lower().endswith(SUFFIXES) or os.path.isdir(path):
        raise MetricsError(f"--output {path}: expected a file ending in {', '.join(SUFFIXES)}.")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise MetricsError(f"--output {path}: there is no such folder.")


def describe(name: str, run: Run) -> str:
    last = max(int(curve.iterations[-1]) for curve in run.values())
    results = [f"{key} {run[key].values[-1]:.4g}" for key in SUMMED_UP if key in run]
    return f"{name}: " + ", ".join([f"iteration {last}", *results])


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    check_output(args.output)
    names = name_runs(args.runs)
    runs = dict(zip(names, map(read_metrics, args.runs), strict=True))
    keys = choose_keys(list(runs.values()), args.keys)
    figure = draw_training_curves(runs, keys, args.smoothing)
    try:
        figure.savefig(args.output)
    except OSError as error:
        raise MetricsError(f"--output {args.output}: {error.strerror}.") from error
    for name, run in runs.items():
        print(describe(name, run))
    print(f"{len(keys)} metric(s) of {len(runs)} run(s): {args.output}")


if __name__ == "__main__":
    try:
        main()
    except MetricsError as error:
        sys.exit(f"error: {error}")
