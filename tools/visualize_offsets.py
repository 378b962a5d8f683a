#!/usr/bin/env python
"""Draw where a network's deformable layers sample, beside the undeformed pattern.

    python tools/visualize_offsets.py --config-file output/config.yaml --input a.jpg \
        --location 120,84 300,200 --output drawn --html explorer.html \
        --opts MODEL.WEIGHTS output/model_final.pth

For every picture <name>_offsets.png: for each location the sampling points through the last
deformable convolutions and, of detectors with deformable RoI pooling, the bins of the most
confident detections. --html writes one page on which any location can be chosen; it needs no
network. Any config with deformable layers. A file that
exists with other contents is not overwritten.
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
    SampledPrediction,
    build_explorer_page,
    draw_offset_figure,
    has_deformable_layer,
    predict_with_sampling,
)

DEFAULT_OUTPUT = "output/offsets"
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
        metavar="DIR",
        help=f"folder for the PNG files (default: {DEFAULT_OUTPUT}; none with --html alone)",
    )
    parser.add_argument("--html", metavar="FILE", help="write the explorer page there")
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
    if args.output and os.path.exists(args.output) and not os.path.isdir(args.output):
        raise ConfigError(f"--output {args.output}: this is a file, expected a folder.")
    if args.html and os.path.isdir(args.html):
        raise ConfigError(f"--html {args.html}: this is a folder, expected a file.")
    names = Counter(output_path(picture, "") for picture in pictures)
    name, number = names.most_common(1)[0]
    if args.output and number > 1:
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


def build_page(predictions: dict[str, SampledPrediction], args: argparse.Namespace) -> str:
    name = os.path.splitext(os.path.basename(args.config_file))[0]
    try:
        return build_explorer_page(
            predictions, args.layers, args.confidence_threshold, f"Where {name} looks"
        )
    except ValueError as error:
        raise ConfigError(f"--html {args.html}: {error}") from error


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if not (args.output or args.html):
        args.output = DEFAULT_OUTPUT
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
    predictions: dict[str, SampledPrediction] = {}
    for picture in pictures:
        prediction = predict_with_sampling(predictor, read_picture(picture))
        if args.html:
            predictions[os.path.basename(picture)] = prediction
        if args.output:
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
    if args.html:
        page = build_page(predictions, args)
        write_new_file(args.html, page.encode())
        logger.info("%s: %.1f MB, open it in a browser", args.html, len(page) / 1e6)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
