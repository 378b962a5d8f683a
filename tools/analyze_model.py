#!/usr/bin/env python
"""Count a network's parameters, FLOPs and activations, and time it, part by part (paper table 4).

    python tools/analyze_model.py --config-file configs/VOC-Detection/rfcn_R_101.yaml \
        --compare configs/VOC-Detection/rfcn_R_101_dconv3_dpool.yaml \
        --tasks parameter flop activation runtime --json cost.json [KEY VALUE ...]

Neither weights nor a data set are needed. Weights are random, with batch norms that fit the input,
unless MODEL.WEIGHTS is among the options at the end; the picture is random, unless --image names
some. What a detector's second stage costs depends on the number of its proposals, which is
printed; with random weights it may be smaller than with learnt ones.

A multiply-add is one FLOP; the deformable operators are counted (d2_deform/ops/flops.py).
"""

import argparse
import json
import os
import sys
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from d2_deform.analysis import (
    TASKS,
    Report,
    analyze_model,
    compare_reports,
    fit_batch_norms,
    prepare_input,
    random_picture,
    read_picture,
)
from d2_deform.engine import ConfigError, load_config
from d2_deform.engine.command_line import positive


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="path to config file")
    parser.add_argument(
        "--compare",
        metavar="FILE",
        help="a second config, shown beside the first with the differences",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=list(TASKS),
        default=list(TASKS),
        help="what to count (default: all)",
    )
    parser.add_argument(
        "--image",
        nargs="+",
        metavar="FILE",
        help="pictures to run on, in place of random ones",
    )
    parser.add_argument(
        "--num-inputs",
        type=positive,
        default=1,
        help="how many random pictures to average over (default: %(default)s)",
    )
    parser.add_argument(
        "--picture-size",
        nargs=2,
        type=positive,
        default=[480, 640],
        metavar=("HEIGHT", "WIDTH"),
        help="of a random picture before INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST resize it "
        "(default: 480 640)",
    )
    parser.add_argument(
        "--num-runs",
        type=positive,
        default=5,
        help="runs whose median is the time (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="write all values there as well")
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        help="config options as 'KEY VALUE' pairs, for both configs; at the end, not after --tasks",
    )
    return parser


def analyze_config(args: argparse.Namespace, config_file: str) -> tuple[Report, dict[str, Any]]:
    """Analyzes one config.

    Returns:
        The report, and what it was made with.
    """
    has_weights = "MODEL.WEIGHTS" in args.opts[::2]
    opts = args.opts if has_weights else ["MODEL.WEIGHTS", "", *args.opts]
    cfg = load_config(config_file, opts, with_data=False)
    seed_all_rng(0)  # the same random weights for what two configs share
    model = build_model(cfg).eval()
    if has_weights:
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)

    if args.image:
        pictures = [read_picture(path) for path in args.image]
    else:
        height, width = args.picture_size
        pictures = [random_picture(height, width, seed) for seed in range(args.num_inputs)]
    inputs = [prepare_input(cfg, picture) for picture in pictures]
    if not has_weights and set(args.tasks) != {"parameter"}:
        fit_batch_norms(model, inputs[:1])
    name = os.path.splitext(os.path.basename(config_file))[0]
    report = analyze_model(model, inputs, args.tasks, name, args.num_runs)
    setting = {
        "config_file": config_file,
        "opts": args.opts,
        "weights": cfg.MODEL.WEIGHTS or "random",
        "pictures": args.image or "random",
        "picture_sizes": [list(x["image"].shape[1:]) for x in inputs],
        "device": cfg.MODEL.DEVICE,
        "num_threads": torch.get_num_threads(),
        "num_runs": args.num_runs,
    }
    return report, setting


def describe(setting: dict[str, Any]) -> str:
    sizes = sorted({f"{height} x {width}" for height, width in setting["picture_sizes"]})
    device = setting["device"]
    if device == "cpu":
        device += f" with {setting['num_threads']} threads"
    pictures = "random" if setting["pictures"] == "random" else "given"
    weights = setting["weights"]
    return (
        f"{setting['config_file']}: {len(setting['picture_sizes'])} {pictures} picture(s) of "
        f"{', '.join(sizes)} pixels, {'random weights' if weights == 'random' else weights}, "
        f"{device}"
    )


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logger(name="d2_deform")
    setup_logger(name="fvcore")
    if args.json and not os.path.isdir(os.path.dirname(args.json) or "."):
        raise ConfigError(f"--json {args.json}: there is no such folder.")
    results = []
    for config_file in filter(None, (args.config_file, args.compare)):
        try:
            results.append(analyze_config(args, config_file))
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(str(error)) from error
    reports = [report for report, _ in results]
    if args.compare and reports[0].name == reports[1].name:
        for report, (_, setting) in zip(reports, results, strict=True):
            report.name = setting["config_file"]

    for _, setting in results:
        print(describe(setting))
    if args.compare:
        tables, summary = compare_reports(*reports)
    else:
        tables, summary = reports[0].table(), reports[0].summary()
    print(f"\n{tables}\n")
    if args.json:
        with open(args.json, "w") as f:
            json.dump([{**setting, **report.as_dict()} for report, setting in results], f, indent=1)
        print(f"All values: {args.json}")
    print(summary)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
