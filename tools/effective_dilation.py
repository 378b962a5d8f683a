#!/usr/bin/env python
"""Measure how far apart a trained network's deformable filters sample (paper table 2).

    python tools/effective_dilation.py --config-file output/config.yaml \
        --output output/effective_dilation [KEY VALUE ...] MODEL.WEIGHTS output/model_final.pth

For every deformable convolution of the backbone: the mean distance of adjacent sampling locations,
for filters whose centre lies in a small, medium or large object's box or in the background.
Pictures and boxes are those of DATASETS.TEST. A table, a histogram and all values go into the
output folder; those made with other settings are not overwritten. What exactly is measured:
docs/effective_dilation.md.
"""

import argparse
import hashlib
import json
import os
import sys
from typing import Any

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from d2_deform.analysis import (
    SIZE_LIMITS,
    LayerDilation,
    build_loader_with_boxes,
    dilation_table,
    dilations_as_dict,
    draw_dilation_histograms,
    measure_effective_dilation,
    summarize_dilations,
)
from d2_deform.data.proposals import check_proposal_files
from d2_deform.engine import ConfigError, load_backbone_weights, load_config
from d2_deform.engine.command_line import positive

NAME = "effective_dilation"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="path to config file")
    parser.add_argument(
        "--output",
        default=f"output/{NAME}",
        metavar="DIR",
        help=f"folder for {NAME}.md, .png and .json (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="put the JSON there instead")
    parser.add_argument(
        "--max-images", type=positive, metavar="N", help="take the first N pictures (default: all)"
    )
    parser.add_argument(
        "--size-limits",
        nargs=2,
        type=float,
        default=SIZE_LIMITS,
        metavar=("MEDIUM", "LARGE"),
        help="where medium and large objects begin, square roots of box areas in pixels of the "
        "original pictures (default: 32 96, COCO's)",
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        help="config options as 'KEY VALUE' pairs, MODEL.WEIGHTS <file> among them; at the end",
    )
    return parser


def output_paths(args: argparse.Namespace) -> dict[str, str]:
    """Where the table, the histogram and the values go, by "md", "png" and "json"."""
    if os.path.exists(args.output) and not os.path.isdir(args.output):
        raise ConfigError(f"--output {args.output}: this is a file, expected a folder.")
    paths = {end: os.path.join(args.output, f"{NAME}.{end}") for end in ("md", "png", "json")}
    if args.json:
        if os.path.isdir(args.json) or not os.path.isdir(os.path.dirname(args.json) or "."):
            raise ConfigError(f"--json {args.json}: this is a folder, or its folder is missing.")
        paths["json"] = args.json
    return paths


def check_may_write(paths: dict[str, str], setting: dict[str, Any]) -> None:
    """Only what the same settings made may be made anew."""
    there = [path for path in paths.values() if os.path.exists(path)]
    if not there:
        return
    try:
        with open(paths["json"]) as file:
            found = json.load(file)["setting"]
    except (OSError, KeyError, TypeError, ValueError):
        raise ConfigError(
            f"--output: {there[0]} is there already and nothing tells how it was made; choose "
            "another folder or move it away."
        ) from None
    differing = [key for key in {**found, **setting} if found.get(key) != setting.get(key)]
    if differing:
        key = differing[0]
        raise ConfigError(
            f"--output: {paths['json']} was made with other settings: {key} was "
            f"{found.get(key)!r}, is {setting.get(key)!r}; choose another folder or delete it."
        )


def read_setting(args: argparse.Namespace, cfg: CfgNode) -> dict[str, Any]:
    """What the result depends on, for JSON."""
    with PathManager.open(cfg.MODEL.WEIGHTS.partition("?")[0], "rb") as file:
        weights = hashlib.sha256(file.read()).hexdigest()
    options = dict(zip(args.opts[::2], args.opts[1::2], strict=True))
    no_matter = ("MODEL.WEIGHTS", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS")
    return {
        "config_file": args.config_file,
        "options": {key: value for key, value in options.items() if key not in no_matter},
        "weights_sha256": weights,
        "datasets": list(cfg.DATASETS.TEST),
        "max_images": args.max_images,
        "size_limits": list(args.size_limits),
    }


def write(
    paths: dict[str, str],
    setting: dict[str, Any],
    layers: dict[str, LayerDilation],
    table: str,
    picture: np.ndarray,
) -> None:
    try:
        os.makedirs(os.path.dirname(paths["md"]), exist_ok=True)
        # First, as it says how the others were made
        with open(paths["json"], "w") as file:
            json.dump({"setting": setting, **dilations_as_dict(layers)}, file)
            file.write("\n")
        with open(paths["md"], "w") as file:
            file.write(f"{table}\n")
    except OSError as error:
        raise ConfigError(f"--output: {error}") from error
    if not cv2.imwrite(paths["png"], np.ascontiguousarray(picture[:, :, ::-1])):
        raise ConfigError(f"--output: {paths['png']} cannot be written.")


def main(argv: list[str] | None = None) -> dict[str, LayerDilation]:
    args = get_parser().parse_args(argv)
    setup_logger()  # Detectron2's own lines: progress and the time left
    setup_logger(name="d2_deform")
    setup_logger(name="fvcore")
    args.size_limits = tuple(args.size_limits)
    if not 0 < args.size_limits[0] < args.size_limits[1]:
        raise ConfigError(
            f"--size-limits: {args.size_limits} given, expected two rising numbers above 0."
        )
    paths = output_paths(args)
    # What the network was trained on need not be here.
    cfg = load_config(args.config_file, ["DATASETS.TRAIN", "()", *args.opts])
    try:
        check_proposal_files(cfg, train=False)
        model = build_model(cfg)
        load_backbone_weights(model, cfg.MODEL.WEIGHTS)
        setting = read_setting(args, cfg)
        check_may_write(paths, setting)
        loader = build_loader_with_boxes(cfg, args.max_images)
        layers = measure_effective_dilation(model, loader, args.size_limits)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # of a loader's process: a traceback, the line last
        raise ConfigError(str(error).strip().splitlines()[-1]) from error

    name = os.path.splitext(os.path.basename(args.config_file))[0]
    limits = " and ".join(f"{limit:g}" for limit in args.size_limits)
    number = "1 picture" if len(loader) == 1 else f"{len(loader)} pictures"
    pictures = f"{number} of {', '.join(cfg.DATASETS.TEST)}"
    heading = (
        f"Effective dilation of {name} on {pictures}, mean ± standard deviation in cells; medium "
        f"and large objects begin at {limits} pixels:"
    )
    table = f"{heading}\n\n{dilation_table(layers)}"
    write(paths, setting, layers, table, draw_dilation_histograms(layers, f"{name}, {pictures}"))
    print(f"\n{table}\n")
    print(
        f"{name}: {summarize_dilations(layers)}. "
        f"Table: {paths['md']}, histogram: {paths['png']}, values: {paths['json']}"
    )
    return layers


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
