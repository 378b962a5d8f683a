#!/usr/bin/env python
"""Export a trained network to a file that runs without Detectron2.

    python tools/export_model.py --config-file output/config.yaml --format onnx \
        --output model.onnx MODEL.WEIGHTS output/model_final.pth

torch-export (torch.export.load) and torchscript (torch.jit.load) need this package's operators
where they are run; onnx (opset 20) has standard operators alone and needs ONNX Runtime with
DeformConv (1.32 is tried). Height and width of the picture are free. What the file takes and gives:
docs/export.md.

--input runs the file on pictures beside the network itself and says how far they are apart.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.logger import setup_logger
from torch import Tensor

from d2_deform.analysis import prepare_input
from d2_deform.engine import (
    ConfigError,
    build_predictor,
    find_pictures,
    load_config,
    read_picture,
    write_new_file,
)
from d2_deform.export import (
    FORMATS,
    Difference,
    ExportedNetwork,
    build_exported,
    compare_detections,
    export_network,
    load_exported,
)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="path to config file")
    parser.add_argument("--format", required=True, choices=list(FORMATS))
    parser.add_argument("--output", required=True, metavar="FILE", help="a file not there yet")
    parser.add_argument(
        "--backbone", action="store_true", help="the backbone alone: it gives its feature maps"
    )
    parser.add_argument(
        "--input",
        nargs="+",
        metavar="PICTURE",
        help="pictures, folders or patterns to run the file on; not as the last flag",
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        help="config options as 'KEY VALUE' pairs, MODEL.WEIGHTS <file> among them; at the end",
    )
    return parser


def describe_input(cfg: CfgNode) -> dict[str, str]:
    """What a program that runs the file has to know, told with it."""
    settings = {
        "input_format": cfg.INPUT.FORMAT,
        "min_size": str(cfg.INPUT.MIN_SIZE_TEST),
        "max_size": str(cfg.INPUT.MAX_SIZE_TEST),
    }
    if cfg.DATASETS.TEST:
        metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
        segmentation = cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor"
        classes = metadata.get("stuff_classes" if segmentation else "thing_classes")
        if classes:
            settings["classes"] = json.dumps(list(classes))
    return settings


@torch.no_grad()
def run_model(network: ExportedNetwork, backbone: bool, image: Tensor) -> tuple[Tensor, ...]:
    """What Detectron2's model says of a prepared picture, as an exported file gives it."""
    if backbone:
        return network(image)
    (output,) = network.model([{"image": image}])
    if "instances" in output:
        found = output["instances"]
        return found.pred_boxes.tensor, found.scores, found.pred_classes
    return tuple(output.values())


def check_file(
    args: argparse.Namespace, cfg: CfgNode, network: ExportedNetwork, pictures: Sequence[str]
) -> str:
    """Runs the written file beside the model and tells differences and times in words."""
    images = [prepare_input(cfg, read_picture(path))["image"] for path in pictures]
    run_file = load_exported(args.output, args.format, torch.get_num_threads())
    expected, seconds_of_model = run_all(partial(run_model, network, args.backbone), images)
    given, seconds_of_file = run_all(run_file, images)
    pairs = list(zip(expected, given, strict=True))
    if "boxes" in network.output_names:
        total = sum((compare_detections(*pair) for pair in pairs), start=Difference())
        words = (
            f"{sum(len(boxes) for boxes, _, _ in expected)} detections, {total.unmatched} without "
            f"a partner, boxes within {total.box:.1g} pixels, scores within {total.score:.1g}"
        )
    else:
        differences = [(a - b).abs().max() for pair in pairs for a, b in zip(*pair, strict=True)]
        words = f"values within {max(differences):.1g}"
    return (
        f"on {len(pictures)} pictures as the model: {words}; median {seconds_of_file:.3f} s a "
        f"picture, the model {seconds_of_model:.3f} s, {torch.get_num_threads()} threads"
    )


def run_all(
    run: Callable[[Tensor], Sequence[Tensor]], images: Sequence[Tensor]
) -> tuple[list[Sequence[Tensor]], float]:
    """The outputs of every picture, and the median of the seconds that one takes."""
    run(images[0])  # the first run sets up
    outputs, seconds = [], []
    for image in images:
        start = time.perf_counter()
        outputs.append(run(image))
        seconds.append(time.perf_counter() - start)
    return outputs, statistics.median(seconds)


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logger(name="d2_deform")
    setup_logger(name="fvcore")
    pictures = find_pictures(args.input) if args.input else []
    if os.path.exists(args.output):
        raise ConfigError(f"--output {args.output} exists and stays; choose another name.")
    start = time.perf_counter()
    cfg = load_config(args.config_file, args.opts, use_gpu=False, with_data=False)
    predictor = build_predictor(cfg)
    try:
        network = build_exported(predictor.model, backbone_only=args.backbone)
        content = export_network(network, args.format, describe_input(cfg))
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{error}.") from error
    write_new_file(args.output, content)
    seconds = time.perf_counter() - start
    if pictures:
        print(check_file(args, cfg, network, pictures))
    name = "backbone" if args.backbone else cfg.MODEL.META_ARCHITECTURE
    print(
        f"{args.output}: {name} as {args.format}, image (3, H, W) -> "
        f"{', '.join(network.output_names)}; {len(content) / 1e6:.1f} MB in {seconds:.0f} s"
    )


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
