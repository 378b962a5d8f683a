#!/usr/bin/env python
r"""Make the small file of weights that comes with the package for one of its configs.

    python tools/publish_model.py --config quickstart.yaml \
        --weights output/quickstart/model_final.pth

Writes output/zoo/<config>_<md5>.pth: the weights alone, in float16 where that keeps them right.
Evaluate that file and put the figure into docs/model_zoo.md. In d2_deform/model_zoo/weights,
`d2_deform.model_zoo.get("<config>.yaml", trained=True)` finds it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from detectron2.modeling import build_model

from d2_deform import model_zoo
from d2_deform.engine import ConfigError, load_config, write_new_file
from d2_deform.engine.weights import load_weights
from d2_deform.model_zoo.trained import pack_trained


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog=(__doc__ or "").split("\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="its name in the zoo")
    parser.add_argument("--weights", required=True, help="checkpoint of the trained network")
    parser.add_argument(
        "--output", type=Path, default="output/zoo", help="folder (default: %(default)s)"
    )
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> Path:
    """Writes the file, whole or not at all; where it is."""
    arguments = parse_arguments(words)
    try:
        file = model_zoo.get_config_file(arguments.config)
    except RuntimeError as error:
        raise ConfigError(f"--config {error}") from error
    opts = ("MODEL.WEIGHTS", arguments.weights)
    cfg = load_config(file, opts, use_gpu=False, with_data=False)
    model = build_model(cfg)
    load_weights(model, cfg.MODEL.WEIGHTS)
    path, content = pack_trained(model.state_dict(), arguments.config, arguments.output)
    write_new_file(str(path), content)
    print(f"{path}: {len(content) / 1e6:.2f} MB")
    return path


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
