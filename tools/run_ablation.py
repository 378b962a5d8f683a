#!/usr/bin/env python
"""Train and evaluate the rows of the paper's table 1 or 3, and write the table.

    python tools/run_ablation.py --table 1 --method rfcn --data digits --seeds 1 2 3
    python tools/run_ablation.py --table 3 --method faster_rcnn --data voc --num-gpus 8

Table 1: 0, 1, 2, 3 and 6 deformable layers. Table 3: fixed dilations, deformable convolution,
deformable RoI pooling, both. Killed or stopped, the same command goes on where it was. The folder
gets table1.md, .csv and .png, beside the paper's figures; docs/experiments.md says how to read it.
"""

import argparse
import os
import shlex
import signal
import sys
from typing import Any

from d2_deform.analysis.ablation import DATA, METHODS, TABLES, Row, Study, find_study
from d2_deform.engine import ConfigError
from d2_deform.engine.ablation import AblationRunner
from d2_deform.engine.command_line import not_negative, positive
from d2_deform.engine.processes import check_gpus

TRAIN_TOOL = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train_net.py")


def get_parser() -> argparse.ArgumentParser:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=int, required=True, choices=TABLES)
    parser.add_argument("--method", required=True, choices=METHODS)
    parser.add_argument(
        "--data",
        required=True,
        choices=DATA,
        help="digits* are made on demand; voc_folder is your own, by option "
        "DATASETS.VOC_FOLDER.ROOT; the others lie below $DETECTRON2_DATASETS",
    )
    parser.add_argument(
        "--seeds",
        type=not_negative,
        nargs="+",
        default=[1, 2, 3],
        metavar="N",
        help="Detectron2's SEED of the runs of each row (default: 1 2 3)",
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="default: output/ablation/<data>_<method>"
    )
    parser.add_argument(
        "--iterations",
        type=positive,
        metavar="N",
        help="in place of the config's SOLVER.MAX_ITER; steps and warm-up change in proportion",
    )
    parser.add_argument(
        "--num-gpus", type=not_negative, default=1, metavar="N", help="default: 1; 0 trains on CPU"
    )
    parser.add_argument(
        "--rows", nargs="+", default=[], metavar="NAME", help="train these alone: plain dconv3 ..."
    )
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="'NAME KEY VALUE ...'",
        help="one more row, the plain network with other keys; may be given several times",
    )
    parser.add_argument(
        "--report-seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="time between two lines of progress (default: %(default)g)",
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        help="config options of all rows as KEY VALUE pairs; at the end, not after --seeds, --rows",
    )
    return parser


def read_arm(study: Study, text: str) -> Row:
    name, *pairs = shlex.split(text) or [""]
    if not name.isidentifier() or not pairs or len(pairs) % 2:
        raise ConfigError(f"--arm '{text}': expected a name of letters and digits, then KEY VALUE.")
    return study.arm(name, dict(zip(pairs[::2], pairs[1::2], strict=True)))


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    check_gpus(args.num_gpus)
    try:
        study = find_study(args.method, args.data)
    except ValueError as error:
        raise ConfigError(f"--method, --data: {error}") from error
    folder = args.output or os.path.join("output", "ablation", f"{args.data}_{args.method}")
    runner = AblationRunner(
        study,
        folder,
        TRAIN_TOOL,
        iterations=args.iterations,
        num_gpus=args.num_gpus,
        opts=args.opts,
        arms=[read_arm(study, text) for text in args.arm],
        report_seconds=args.report_seconds,
    )
    failed = runner.run(args.table, args.seeds, args.rows)
    if failed:
        raise ConfigError(
            f"{len(failed)} run(s) failed: {', '.join(run.name for run in failed)}; the same "
            "command tries them again."
        )
    with open(os.path.join(runner.folder, f"table{args.table}.md")) as file:
        print(f"\n{file.read()}\nAll of it: {os.path.join(runner.folder, f'table{args.table}.*')}")


def _stop(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _stop)
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\nStopped. To go on: {shlex.join(['python', *sys.argv])}")
