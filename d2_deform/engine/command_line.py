"""What the tools share between the command line and their main function."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from detectron2.engine import default_argument_parser, launch

from d2_deform.data.classification_mapper import UnreadablePicture
from d2_deform.engine.defaults import ConfigError
from d2_deform.ops import built_devices

__all__ = ["check_gpus", "not_negative", "positive", "run_tool"]


def run_tool(main: Callable[[argparse.Namespace], Any], needs_operators: bool = True) -> None:
    """Runs ``main(args)`` in as many processes as the command line asks for.

    A mistake of the user's ends the program with one line.

    Args:
        main: takes what ``default_argument_parser()`` gives.
        needs_operators: False if ``main`` may train networks without this package's operators.
    """
    args = default_argument_parser().parse_args()
    check_gpus(args.num_gpus, needs_operators)
    try:
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except UnreadablePicture as error:
        # A data loader's process hands over its traceback, which ends with the line itself.
        sys.exit(f"error: {str(error).strip().rpartition('UnreadablePicture: ')[2]}")


def check_gpus(wanted: int, needs_operators: bool = True) -> None:
    """Ends the program where several GPUs are asked for that cannot be used."""
    found = torch.cuda.device_count()
    if wanted > max(found, 1):
        reason = f"this machine has {found}"
    elif wanted > 1 and needs_operators and "cuda" not in built_devices():
        reason = "d2_deform's operators are built for CPU only"
    else:
        return
    sys.exit(f"error: --num-gpus {wanted}: {reason}; --num-gpus 0 trains on CPU.")


def positive(text: str) -> int:
    """A whole number of 1 or more, for ``argparse``."""
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """A whole number of 0 or more, for ``argparse``."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"{text} given, expected {least} or more")
    return number
