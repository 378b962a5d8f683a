#!/usr/bin/env python
"""Export a trained network to a file that runs without Detectron2.

    python tools/export_model.py --config-file output/config.yaml --format onnx \
        --output model.onnx MODEL.WEIGHTS output/model_final.pth

torch-export (torch.export.load) and torchscript (torch.jit.load) need this package's operators
where they are run; onnx (opset 20) has standard operators alone and needs ONNX Runtime, 1.23 or
newer. Height and width of the picture are free. What the file takes and gives: docs/export.md.

--input runs the file on pictures beside the network itself and says how far they are apart.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.logger import setup_logger
from torch import Tensor, nn

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


def run_model(model: nn.Module, image: Tensor) -> tuple[Tensor, ...]:
    """What Detectron2's model says of a prepared picture, as an exported file gives it."""
    with torch.no_grad():
        (output,) = model([{"image": image}])
    if "instances" in output:
        found = output["instances"]
        return found.pred_boxes.tensor, found.scores, found.pred_classes
    return tuple(output.values())


def check_file(
    args: argparse.Namespace, cfg: CfgNode, network: ExportedNetwork, pictures: Sequence[str]
) -> str:
    """Runs the written file beside the model and tells the greatest differences in words."""
    run = load_exported(args.output, args.format)
    total = Difference()
    detections, value = 0, 0.0
    for path in pictures:
        image = prepare_input(cfg, read_picture(path))["image"]
        given = run(image)
        if args.backbone:
            with torch.no_grad():
                expected = network(image)
        else:
            expected = run_model(network.model, image)
        if "boxes" in network.output_names:
            detections += len(expected[0])
            total += compare_detections(expected, given)
        else:
            pairs = zip(expected, given, strict=True)
            value = max(value, *(float((a - b).abs().max()) for a, b in pairs))
    if "boxes" in network.output_names:
        words = (
            f"{detections} detections, {total.unmatched} without a partner, boxes within "
            f"{total.box:.1g} pixels, scores within {total.score:.1g}"
        )
    else:
        words = f"values within {value:.1g}"
    return f"on {len(pictures)} pictures as the model: {words}"


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
