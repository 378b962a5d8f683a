#!/usr/bin/env python
"""Train and predict for long, on pictures of ever other sizes, and watch what the process holds.

    OMP_NUM_THREADS=1 python tools/soak.py --output output/soak
    python tools/soak.py --output output/soak --iterations 0 MODEL.WEIGHTS model_final.pth

A deformable R-FCN (configs/quickstart.yaml, of half its width) is trained on Deformed Digits by
DeformTrainer, with data loader, metrics and checkpoints, and then predicts by DefaultPredictor.
Memory, file handles and threads are written to usage.json and drawn into usage.png. The exit status
is 1 where the peak of the last quarter of a run is above that of the second one: memory in use by
more than 2 percent, file handles or threads at all.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Sequence

import cv2
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from d2_deform.analysis.process_usage import Usage, growth, read_usage
from d2_deform.engine import ConfigError, DeformTrainer, build_predictor, setup
from d2_deform.engine.command_line import not_negative

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PERIOD = 10  # steps between two looks
SIDES = (64, 256)  # of a picture to predict on, least and most
TOLERANCE = 0.02  # of memory in use
SETTINGS = [
    *("INPUT.MIN_SIZE_TRAIN", "(64, 192)"),
    *("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"),
    *("INPUT.MAX_SIZE_TRAIN", "256"),
    *("INPUT.CROP.ENABLED", "True"),
    *("INPUT.CROP.TYPE", "relative_range"),
    *("INPUT.CROP.SIZE", "(0.5, 0.5)"),
    *("INPUT.MIN_SIZE_TEST", "0"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "8"),
    *("MODEL.RFCN.CONV_DIM", "64"),
    *("DATASETS.TEST", "()"),
    *("DATALOADER.NUM_WORKERS", "2"),
    *("SOLVER.IMS_PER_BATCH", "2"),
    *("SOLVER.CHECKPOINT_PERIOD", "200"),
]


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where all is written")
    for name in ("iterations", "predictions"):
        parser.add_argument(
            f"--{name}",
            type=not_negative,
            default=2000,
            metavar="N",
            help=f"0: none; otherwise {4 * PERIOD} or more (default: %(default)s)",
        )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options, KEY VALUE ...")
    return parser


class UsageRecorder(HookBase):
    """Notes what the process holds, every ``PERIOD`` iterations."""

    def __init__(self) -> None:
        self.usages: list[Usage] = []

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % PERIOD == 0:
            self.usages.append(read_usage(self.trainer.iter + 1))


def read_config(args: argparse.Namespace) -> CfgNode:
    opts = [
        *SETTINGS,
        *("SOLVER.MAX_ITER", str(args.iterations)),
        *("OUTPUT_DIR", args.output),
        *args.opts,
    ]
    config_file = os.path.join(REPOSITORY, "configs", "quickstart.yaml")
    return setup(
        argparse.Namespace(
            config_file=config_file,
            opts=opts,
            num_gpus=1,
            resume=False,
            eval_only=not args.iterations,
        )
    )


def train(cfg: CfgNode) -> list[Usage]:
    trainer = DeformTrainer(cfg)
    recorder = UsageRecorder()
    trainer.register_hooks([recorder])
    trainer.train()
    return recorder.usages


def predict(cfg: CfgNode, number: int) -> list[Usage]:
    """Predicts on pictures of the training set, each resized to a random height and width."""
    predictor = build_predictor(cfg)
    files = [record["file_name"] for record in DatasetCatalog.get(cfg.DATASETS.TRAIN[0])]
    rng = random.Random(0)
    usages = []
    for step in range(1, number + 1):
        picture = cv2.imread(rng.choice(files))
        predictor(cv2.resize(picture, (rng.randint(*SIDES), rng.randint(*SIDES))))
        if step % PERIOD == 0:
            usages.append(read_usage(step))
    return usages


def summarize(name: str, usages: Sequence[Usage]) -> tuple[str, bool]:
    """One line on a run, and whether it holds ever more."""
    more = {
        name: growth([getattr(usage, name) for usage in usages])
        for name in ("memory", "allocated", "files", "threads")
    }
    most = max(usage.allocated for usage in usages)
    last = usages[-1]
    minutes = (last.seconds - usages[0].seconds) / 60
    line = (
        f"{name}: {last.step} in {minutes:.1f} minutes; in the last quarter and more than in the "
        f"second: memory {last.memory:.0f} MiB ({more['memory']:+.1f}), in use "
        f"{last.allocated:.0f} MiB ({more['allocated']:+.1f}), file handles {last.files} "
        f"({more['files']:+.0f}), threads {last.threads} ({more['threads']:+.0f})"
    )
    grew = more["allocated"] > TOLERANCE * most or more["files"] > 0 or more["threads"] > 0
    return line, grew


def write(runs: dict[str, list[Usage]], folder: str) -> None:
    with open(os.path.join(folder, "usage.json"), "w") as file:
        json.dump(
            {name: [usage._asdict() for usage in usages] for name, usages in runs.items()}, file
        )
    draw(runs).savefig(os.path.join(folder, "usage.png"), dpi=80)


def draw(runs: dict[str, list[Usage]]) -> Figure:
    """A column for each run; memory above, file handles and threads below."""
    figure = Figure(figsize=(4.5 * len(runs), 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(runs), squeeze=False, sharex="col", sharey="row")
    for (above, below), (name, usages) in zip(axes.T, runs.items(), strict=True):
        steps = [usage.step for usage in usages]
        above.plot(steps, [usage.memory for usage in usages], color="#0072b2", label="resident")
        in_use = [usage.allocated for usage in usages]
        above.plot(steps, in_use, color="#56b4e9", label="in use by malloc")
        above.set(title=name, ylim=(0, None))
        above.legend(loc="center right")
        below.step(steps, [usage.files for usage in usages], color="#d55e00", label="file handles")
        below.step(steps, [usage.threads for usage in usages], color="#009e73", label="threads")
        below.set(xlabel="step", ylim=(0, None))
        below.legend(loc="center right")
    axes[0][0].set_ylabel("memory of the process, MiB")
    axes[1][0].set_ylabel("number")
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    if not any((args.iterations, args.predictions)) or any(
        0 < number < 4 * PERIOD for number in (args.iterations, args.predictions)
    ):
        parser.error(f"--iterations, --predictions: 0 or at least {4 * PERIOD}, not both 0.")
    cfg = read_config(args)
    runs: dict[str, list[Usage]] = {}
    if args.iterations:
        runs["training iterations"] = train(cfg)
        write(runs, args.output)
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    if args.predictions:
        runs["predictions"] = predict(cfg, args.predictions)
        write(runs, args.output)
    lines, grew = zip(*(summarize(*run) for run in runs.items()), strict=True)
    print("\n".join(lines))
    print(f"All values: {args.output}")
    if any(grew):
        sys.exit("error: the process holds ever more.")


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
