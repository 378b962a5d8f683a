#!/usr/bin/env python
"""Draw a network's predictions on pictures, and where its deformable layers look.

    python tools/demo.py --config-file output/config.yaml --input a.jpg "folder/*.png" folder \
        --output drawn [--show-sampling] --opts MODEL.WEIGHTS output/model_final.pth

Training leaves output/config.yaml, which has the number of classes. No data set is needed; names
of classes are shown if the data set that the config tests on is known or its folder is there.
Detectors and semantic segmentation; --show-sampling is for detectors.
"""

import argparse
import os
import sys
import time
from typing import Any

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.utils.logger import setup_logger
from detectron2.utils.visualizer import Visualizer

from d2_deform.engine import ConfigError, find_pictures, load_config
from d2_deform.engine.pictures import PICTURE_SUFFIXES
from d2_deform.visualization import predict_with_figure


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
        help="beside each drawn picture, <name>_sampling.png: the sampling points and part bins of "
        "the most confident detection",
    )
    parser.add_argument(
        "--opts",
        default=[],
        nargs=argparse.REMAINDER,
        help="config options as 'KEY VALUE' pairs, MODEL.WEIGHTS <file> among them; last flag",
    )
    return parser


def setup_cfg(args: argparse.Namespace) -> CfgNode:
    cfg = load_config(args.config_file, args.opts, with_data=False)
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = args.confidence_threshold
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = args.confidence_threshold
    cfg.freeze()
    if cfg.MODEL.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals":
        raise ConfigError(
            'MODEL.PROPOSAL_GENERATOR.NAME is "PrecomputedProposals": this network needs proposals '
            "made beforehand and cannot predict on new pictures; evaluate it by tools/train_net.py "
            "--eval-only."
        )
    if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
        raise ConfigError(
            "MODEL.META_ARCHITECTURE is ProposalNetwork, which finds regions and no objects; "
            "tools/dump_proposals.py writes what it finds."
        )
    if args.show_sampling and cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor":
        raise ConfigError("--show-sampling is for detectors; leave it out for segmentation.")
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError(
            "MODEL.WEIGHTS is empty, so there is nothing to predict with; "
            "add: --opts MODEL.WEIGHTS path/to/model_final.pth"
        )
    return cfg


def output_paths(pictures: list[str], output: str, show_sampling: bool) -> list[list[str]]:
    """For each picture, where it goes drawn and, if asked for, its sampling; makes the folder."""
    is_file = output.lower().endswith(PICTURE_SUFFIXES) and not os.path.isdir(output)
    if is_file and len(pictures) > 1:
        raise ConfigError(f"--output {output}: {len(pictures)} pictures need a folder.")
    if not is_file and os.path.isfile(output):
        raise ConfigError(f"--output {output}: this is a file, expected a folder or a new name.")
    folder = os.path.dirname(output) if is_file else output
    drawn = [output] if is_file else [os.path.join(folder, os.path.basename(p)) for p in pictures]
    paths = [
        [path, os.path.splitext(path)[0] + "_sampling.png"] if show_sampling else [path]
        for path in drawn
    ]
    flat = [os.path.realpath(path) for group in paths for path in group]
    overwritten = set(flat) & {os.path.realpath(picture) for picture in pictures}
    if overwritten:
        raise ConfigError(
            f"--output {output}: {min(overwritten)} would be overwritten; choose another folder."
        )
    if len(set(flat)) < len(flat):
        raise ConfigError("--input: two pictures have the same file name; draw them in two runs.")
    os.makedirs(folder or ".", exist_ok=True)
    return paths


def draw_prediction(
    predictor: DefaultPredictor, image: np.ndarray, outputs: dict[str, Any]
) -> tuple[np.ndarray, str]:
    """Draws a network's outputs on a BGR picture.

    Returns:
        The drawn picture, RGB, and how much is on it in words.
    """
    visualizer = Visualizer(image[:, :, ::-1], getattr(predictor, "metadata", None))
    if "sem_seg" in outputs:
        labels = outputs["sem_seg"].argmax(dim=0).to("cpu")
        return visualizer.draw_sem_seg(labels).get_image(), f"{len(labels.unique())} classes"
    instances = outputs["instances"].to("cpu")
    drawn = visualizer.draw_instance_predictions(instances).get_image()
    return drawn, f"{len(instances)} instances"


def write(path: str, picture: np.ndarray) -> None:
    """Writes an RGB picture."""
    if not cv2.imwrite(path, np.ascontiguousarray(picture[:, :, ::-1])):
        raise ConfigError(f"{path} cannot be written.")


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    logger = setup_logger(name="d2_deform")
    setup_logger(name="fvcore")
    cfg = setup_cfg(args)
    pictures = find_pictures(args.input)
    outputs = output_paths(pictures, args.output, args.show_sampling)
    predictor = DefaultPredictor(cfg)
    for picture, paths in zip(pictures, outputs, strict=True):
        image = cv2.imread(picture, cv2.IMREAD_COLOR)
        if image is None:
            logger.warning("%s cannot be read as a picture and is left out.", picture)
            continue
        start = time.perf_counter()
        if args.show_sampling:
            instances, sampling = predict_with_figure(predictor, image, args.confidence_threshold)
            write(paths[1], sampling)
            outputs_of_picture = {"instances": instances}
        else:
            outputs_of_picture = predictor(image)
        drawn, content = draw_prediction(predictor, image, outputs_of_picture)
        write(paths[0], drawn)
        logger.info(
            "%s: %s, drawn in %s (%.2f s)",
            picture,
            content,
            " and ".join(paths),
            time.perf_counter() - start,
        )


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
