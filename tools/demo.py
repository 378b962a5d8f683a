#!/usr/bin/env python
"""Draw a detector's predictions on pictures, and where its deformable layers look.

    python tools/demo.py --config-file configs/<name>.yaml --input a.jpg "folder/*.png" folder \
        --output drawn [--show-sampling] --opts MODEL.WEIGHTS output/model_final.pth
"""

import argparse
import glob
import os
import sys
import time

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.utils.logger import setup_logger
from detectron2.utils.visualizer import Visualizer

from d2_deform.engine import ConfigError, load_config
from d2_deform.visualization import draw_prediction_figure

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


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
        "--output",
        default="output/demo",
        help="folder for drawn pictures, or a file name for a single one (default: %(default)s)",
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        help="least score of a prediction to be shown (default: %(default)s)",
    )
    parser.add_argument(
        "--show-sampling",
        action="store_true",
        help="beside it, the sampling points of the most confident detection, and its part bins",
    )
    parser.add_argument(
        "--opts",
        default=[],
        nargs=argparse.REMAINDER,
        help="config options as 'KEY VALUE' pairs, MODEL.WEIGHTS <file> among them; last flag",
    )
    return parser


def setup_cfg(args: argparse.Namespace) -> CfgNode:
    cfg = load_config(args.config_file, args.opts)
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = args.confidence_threshold
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = args.confidence_threshold
    cfg.freeze()
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError(
            "MODEL.WEIGHTS is empty, so there is nothing to predict with; "
            "add: --opts MODEL.WEIGHTS path/to/model_final.pth"
        )
    return cfg


def find_pictures(inputs: list[str]) -> list[str]:
    """Expands folders and patterns, in order, each picture once."""
    paths: dict[str, None] = {}
    for given in inputs:
        given = os.path.expanduser(given)
        if os.path.isdir(given):
            found = [
                os.path.join(given, name)
                for name in sorted(os.listdir(given))
                if name.lower().endswith(PICTURE_SUFFIXES)
            ]
        else:
            found = [given] if os.path.isfile(given) else sorted(glob.glob(given))
        if not found:
            raise ConfigError(f"--input {given}: no picture is found there.")
        paths.update(dict.fromkeys(found))
    return list(paths)


def output_paths(pictures: list[str], output: str) -> list[str]:
    """Where each drawn picture goes; makes the folder."""
    is_file = output.lower().endswith(PICTURE_SUFFIXES) and not os.path.isdir(output)
    if is_file and len(pictures) > 1:
        raise ConfigError(f"--output {output}: {len(pictures)} pictures need a folder.")
    if is_file:
        os.makedirs(os.path.dirname(output) or ".", exist_ok=True)
        return [output]
    if os.path.isfile(output):
        raise ConfigError(f"--output {output}: this is a file, expected a folder or a new name.")
    os.makedirs(output, exist_ok=True)
    paths = [os.path.join(output, os.path.basename(picture)) for picture in pictures]
    if len(set(paths)) < len(paths):
        raise ConfigError("--input: two pictures have the same file name; draw them in two runs.")
    return paths


def draw_boxes(predictor: DefaultPredictor, image: np.ndarray) -> tuple[np.ndarray, int]:
    """Draws predictions on a BGR picture.

    Returns:
        The drawn picture, RGB, and the number of predictions.
    """
    predictions = predictor(image)
    instances = predictions["instances"].to("cpu")
    visualizer = Visualizer(image[:, :, ::-1], getattr(predictor, "metadata", None))
    return visualizer.draw_instance_predictions(instances).get_image(), len(instances)


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    logger = setup_logger(name="d2_deform")
    setup_logger(name="fvcore")
    cfg = setup_cfg(args)
    pictures = find_pictures(args.input)
    outputs = output_paths(pictures, args.output)
    predictor = DefaultPredictor(cfg)
    for picture, output in zip(pictures, outputs, strict=True):
        image = cv2.imread(picture, cv2.IMREAD_COLOR)
        if image is None:
            logger.warning("%s cannot be read as a picture and is left out.", picture)
            continue
        start = time.perf_counter()
        drawn, number = draw_boxes(predictor, image)
        seconds = time.perf_counter() - start
        if args.show_sampling:
            drawn = draw_prediction_figure(predictor, image, args.confidence_threshold)
        if not cv2.imwrite(output, np.ascontiguousarray(drawn[:, :, ::-1])):
            raise ConfigError(f"{output} cannot be written.")
        logger.info("%s: %d instances in %.2f s, drawn in %s", picture, number, seconds, output)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
