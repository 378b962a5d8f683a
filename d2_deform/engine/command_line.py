"""What the tools share between the command line and their main function."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from detectron2.engine import default_argument_parser

from d2_deform.data.checked_mapper import UnreadablePicture
from d2_deform.engine.defaults import ConfigError
from d2_deform.engine.loss_guard import NonFiniteLoss
from d2_deform.engine.processes import run_in_processes

__all__ = ["not_negative", "positive", "run_tool"]


def run_tool(main: Callable[[argparse.Namespace], Any], needs_operators: bool = True) -> None:
    """Runs ``main(args)`` in as many processes as the command line, or torchrun, asks for.

    A mistake of the user's ends the program with one line.

    Args:
        main: takes what ``default_argument_parser()`` gives.
        needs_operators: False if ``main`` may train networks without this package's operators.
    """
    args = default_argument_parser().parse_args()
    try:
        run_in_processes(partial(_tell_mistakes, main), args, needs_operators)
    except ConfigError as error:
        sys.exit(f"error: {error}")


def _tell_mistakes(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Runs ``main(args)`` in one process."""
    try:
        main(args)
    except (ConfigError, NonFiniteLoss, OSError) as error:
        sys.exit(f"error: {error}")
    except UnreadablePicture as error:
        # A data loader's process hands over its traceback, which ends with the line itself.
        sys.exit(f"error: {str(error).strip().rpartition('UnreadablePicture: ')[2]}")


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
