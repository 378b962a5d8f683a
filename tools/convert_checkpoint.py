#!/usr/bin/env python
r"""Convert a checkpoint of another code base for the network of a config.

    python tools/convert_checkpoint.py --from release --input rfcn_dcn_coco-0000.params \
        --config-file configs/COCO-Detection/rfcn_R_101_dconv3_dpool_release.yaml \
        --output rfcn_dcn_coco.pth
    python tools/convert_checkpoint.py --from torchvision --input resnet50-11ad3fa6.pth \
        --config-file configs/VOC-Detection/rfcn_R_50_dconv3_dpool.yaml --output r50.pth \
        MODEL.RESNETS.STRIDE_IN_1X1 False

The output is for MODEL.WEIGHTS. Every name of the file and of the network is accounted for. The
exit status is 0 if all is well, 2 if --allow-incomplete wrote a file in spite of what is missing or
unknown, and 1 if nothing was written.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from d2_deform.checkpoint import SOURCES, convert, pack, read_source_file
from d2_deform.engine import ConfigError, load_config, write_new_file


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog=(__doc__ or "").split("\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        choices=sorted(SOURCES),
        help='where the file is from; "release" is the paper\'s, for MXNet',
    )
    parser.add_argument("--input", required=True, help="the checkpoint: .params, .pth or .pkl")
    parser.add_argument("--config-file", required=True, help="config of the network to load it")
    parser.add_argument("--output", required=True, help="the file to write; none is overwritten")
    parser.add_argument(
        "--box-layer",
        choices=("normalized", "folded"),
        help="what the box layer of a release's file is that has it only once",
    )
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="unpickle --input even if that may run code that its author put into it",
    )
    parser.add_argument(
        "--allow-incomplete",
        action="store_true",
        help="write what fits, though names are missing or unknown (exit status 2)",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options, KEY VALUE ...")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Converts, prints the account, writes the file; the exit status."""
    arguments = parse_arguments(words)
    if not arguments.output.endswith(".pth"):
        raise ConfigError(f"--output {arguments.output}: expected a name that ends in .pth.")
    if os.path.exists(arguments.output):
        raise ConfigError(f"--output {arguments.output}: it exists and stays; choose another name.")
    opts = [*arguments.opts, "MODEL.WEIGHTS", ""]
    cfg = load_config(arguments.config_file, opts, use_gpu=False, with_data=False)
    source = read_source_file(arguments.input, arguments.trust_pickle)
    account = convert(source, arguments.source, cfg, arguments.box_layer)
    print("\n".join(account.lines()))
    if not (account.complete or arguments.allow_incomplete):
        print("Nothing is written; --allow-incomplete writes what fits.")
        return 1
    write_new_file(arguments.output, pack(account.weights))
    used = " ".join(f'"{word}"' if " " in word else word for word in arguments.opts)
    print(
        f"Use it: --config-file {arguments.config_file} ... {used}{' ' if used else ''}"
        f"MODEL.WEIGHTS {arguments.output}"
    )
    return 0 if account.complete else 2


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as error:
        sys.exit(f"error: {error}")
