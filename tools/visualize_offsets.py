#!/usr/bin/env python
"""Draw where a network's deformable layers sample, beside the undeformed pattern.

    python tools/visualize_offsets.py --config-file output/config.yaml --input a.jpg \
        --location 120,84 300,200 --output drawn \
        --opts MODEL.WEIGHTS output/model_final.pth

For every picture <name>_offsets.png: for each location the sampling points through the last
deformable convolutions and, of detectors with deformable RoI pooling, the bins of the most
confident detections. Any config with deformable layers will do. A file that exists with other
contents is not overwritten.
"""

import argparse
import os
import sys
from collections import Counter

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger

from d2_deform.engine import (
    ConfigError,
    build_predictor,
    find_pictures,
    load_config,
    read_picture,
    write_new_file,
)
from d2_deform.visualization import (
    draw_offset_figure,
    has_deformable_layer,
    predict_with_sampling,
)

MAX_LAYERS = 5  # 59,049 points


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="path to config file")
    parser.add_argument(
        "--input", nargs="+", required=True, help="pictures, folders, or patterns like 'dir/*.jpg'"
    )
    parser.add_argument(
        "--location",
        nargs="+",
        type=_location,
        default=[],
        metavar="X,Y",
        help="in pixels of the pictures (default: the middle of the most confident detection, or "
        "of the picture)",
    )
    parser.add_argument(
        "--layers",
        type=_layers,
        default=3,
        metavar="N",
        help="follow the last N deformable convolutions (default: %(default)s)",
    )
    parser.add_argument(
        "--group",
        type=int,
        default=0,
        metavar="G",
        help="of several deformable groups, the one to follow (default: %(default)s)",
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        help="least score of a detection to be shown (default: %(default)s)",
    )
    parser.add_argument(
        "--detections",
        type=int,
        default=1,
        metavar="N",
        help="show the bins of the N most confident detections (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        default="output/offsets",
        metavar="DIR",
        help="folder for the PNG files (default: %(default)s)",
    )
    parser.add_argument(
        "--opts",
        default=[],
        nargs=argparse.REMAINDER,
        help="config options as 'KEY VALUE' pairs, MODEL.WEIGHTS <file> among them; last flag",
    )
    return parser


def _location(text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} given, expected X,Y such as 120,84") from None
    return x, y


def _layers(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= MAX_LAYERS:
        raise argparse.ArgumentTypeError(f"{text} given, accepted is 1 to {MAX_LAYERS}")
    return int(text)


def setup_cfg(args: argparse.Namespace) -> CfgNode:
    cfg = load_config(args.config_file, args.opts, with_data=False)
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = args.confidence_threshold
    cfg.freeze()
    return cfg


def output_path(picture: str, output: str) -> str:
    name = os.path.splitext(os.path.basename(picture))[0]
    return os.path.join(output, f"{name}_offsets.png")


def check_outputs(pictures: list[str], args: argparse.Namespace) -> None:
    """Says what cannot work before anything is computed."""
    if os.path.exists(args.output) and not os.path.isdir(args.output):
        raise ConfigError(f"--output {args.output}: this is a file, expected a folder.")
    names = Counter(output_path(picture, "") for picture in pictures)
    name, number = names.most_common(1)[0]
    if number > 1:
        raise ConfigError(
            f"--input: {number} pictures would be drawn into {name}; draw them in several runs."
        )


def check_locations(picture: str, image: np.ndarray, locations: list[tuple[float, float]]) -> None:
    height, width = image.shape[:2]
    for x, y in locations:
        if not (0 <= x <= width and 0 <= y <= height):
            raise ConfigError(
                f"--location {x:g},{y:g}: it is outside {picture}, which is {width} x {height} "
                "pixels."
            )


def encode_png(picture: np.ndarray) -> bytes:
    """Of an RGB picture."""
    return bytes(cv2.imencode(".png", np.ascontiguousarray(picture[:, :, ::-1]))[1])


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    logger = setup_logger(name="d2_deform")
    setup_logger(name="fvcore")
    cfg = setup_cfg(args)
    pictures = find_pictures(args.input)
    check_outputs(pictures, args)
    for picture in pictures:
        check_locations(picture, read_picture(picture), args.location)

    predictor = build_predictor(cfg)
    if not has_deformable_layer(predictor.model):
        raise ConfigError(
            f"{args.config_file} has no deformable layer (MODEL.DEFORM.NUM_LAYERS is 0), so there "
            "is nothing to draw."
        )
    for picture in pictures:
        prediction = predict_with_sampling(predictor, read_picture(picture))
        try:
            figure = draw_offset_figure(
                prediction,
                args.location,
                args.layers,
                args.group,
                args.confidence_threshold,
                args.detections,
            )
        except ValueError as error:
            raise ConfigError(f"{picture}: {error}") from error
        path = output_path(picture, args.output)
        write_new_file(path, encode_png(figure))
        logger.info("%s: drawn in %s", picture, path)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
