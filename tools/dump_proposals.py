#!/usr/bin/env python
"""Write the proposals of a trained RPN to files, for detectors trained on fixed proposals.

    python tools/train_net.py --config-file configs/VOC-Ablation/rpn_R_101.yaml --num-gpus 8
    python tools/dump_proposals.py --config-file configs/VOC-Ablation/rpn_R_101.yaml \
        --output output/VOC-Ablation/proposals MODEL.WEIGHTS <its model_final.pth>

Every data set of DATASETS.TRAIN and DATASETS.TEST gets <output>/<data set>_proposals.pkl. The lines
printed last go into the config of the detector, beside MODEL.LOAD_PROPOSALS True and
MODEL.PROPOSAL_GENERATOR.NAME "PrecomputedProposals".
"""

import argparse
import sys
from collections.abc import Sequence

from detectron2.utils.logger import setup_logger

from d2_deform.engine import ConfigError, dump_proposals, load_config
from d2_deform.engine.proposals import proposal_file


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog=(__doc__ or "").split("\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, help="config that the RPN is trained with")
    parser.add_argument("--output", required=True, help="folder for the files")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options, KEY VALUE ...")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Writes the files and prints how to use them; the results of every data set."""
    arguments = parse_arguments(words)
    setup_logger()  # Detectron2's own lines: progress and the time left
    cfg = load_config(arguments.config_file, arguments.opts)
    results = dump_proposals(cfg, arguments.output)
    print("DATASETS:")
    for part in ("TRAIN", "TEST"):
        print(f"  {part}: {tuple(cfg.DATASETS[part])}")
        files = tuple(proposal_file(arguments.output, name) for name in cfg.DATASETS[part])
        print(f"  PROPOSAL_FILES_{part}: {files}")
    return results


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
