#!/usr/bin/env python
"""Work out, on paper, how training of a network should scale from one GPU to many.

    python tools/plan_scaling.py --config-file configs/VOC-Ablation/rfcn_R_101_dconv3_dpool.yaml \
        --step-seconds 0.05

Prints the bytes of its gradients (float32, layers that learn) and, for networks and numbers of
GPUs, 8 to a machine, the time of their all-reduce and the efficiency: pictures a second and GPU, as
a share of those of one GPU. What is assumed: docs/distributed.md. Nothing is measured here; the
time of a step on one GPU is yours to measure.
"""

import argparse
import sys

from detectron2.modeling import build_model
from tabulate import tabulate  # type: ignore[import-untyped]

from d2_deform.analysis.scaling_plan import Cluster, all_reduce_seconds, scaling_efficiency
from d2_deform.engine import ConfigError, load_config
from d2_deform.engine.command_line import positive

NETWORKS = {  # bytes per second of a machine, each way
    "10 Gbit/s": 1.25e9,
    "100 Gbit/s": 12.5e9,
    "400 Gbit/s": 50e9,
    "8 x 400 Gbit/s": 400e9,
}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="path to config file")
    parser.add_argument(
        "--step-seconds",
        type=_seconds,
        required=True,
        metavar="S",
        help="time of a step on one GPU alone",
    )
    parser.add_argument(
        "--slowest",
        type=_factor,
        default=1.0,
        metavar="F",
        help="time of the slowest process's step by the mean one's; 1 where all pictures are of "
        "one size (default: %(default)s)",
    )
    parser.add_argument(
        "--num-gpus",
        type=positive,
        nargs="+",
        default=[8, 16, 32, 64, 128, 256, 512],
        metavar="N",
        help="(default: %(default)s)",
    )
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} given, expected more than 0")
    return seconds


def _factor(text: str) -> float:
    factor = float(text)
    if not 1 <= factor < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} given, expected 1 or more")
    return factor


def count_gradient_bytes(config_file: str) -> int:
    cfg = load_config(config_file, ["MODEL.WEIGHTS", ""], use_gpu=False, with_data=False)
    model = build_model(cfg)
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    num_bytes = count_gradient_bytes(args.config_file)
    rows = []
    for num_gpus in args.num_gpus:
        row = [str(num_gpus)]
        for network in NETWORKS.values():
            cluster = Cluster(network)
            seconds = all_reduce_seconds(num_bytes, num_gpus, cluster)
            efficiency = scaling_efficiency(
                args.step_seconds, num_bytes, num_gpus, cluster, args.slowest
            )
            row.append(f"{1000 * seconds:.1f} ms, {100 * efficiency:.0f} %")
        rows.append(row)
    print(f"gradients: {num_bytes / 1e6:.0f} MB a step and GPU")
    print(tabulate(rows, ["GPUs", *NETWORKS], tablefmt="github"))


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
