"""From one command line to the processes of a training: Detectron2's launch, or torchrun."""

import argparse
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from d2_deform.engine.defaults import ConfigError
from d2_deform.ops import built_devices

__all__ = ["check_gpus", "run_in_processes"]


def run_in_processes(
    main: Callable[[argparse.Namespace], Any],
    args: argparse.Namespace,
    needs_operators: bool = True,
) -> None:
    """Runs ``main(args)`` in as many processes as torchrun started, or as ``args`` ask for.

    Under torchrun this process is one of them: it takes its rank from the environment and talks by
    NCCL, or by gloo with ``--num-gpus 0`` or without a GPU. Otherwise Detectron2's ``launch``
    starts ``--num-gpus`` processes (for 0: one) on each of ``--num-machines`` machines. A process
    that waits for another longer than Detectron2's ``DEFAULT_TIMEOUT`` fails.

    Args:
        main: importable by its name.
        args: of ``default_argument_parser()``.
        needs_operators: see `check_gpus`.

    Raises:
        ConfigError: the options cannot go together.
        SystemExit: a process of this machine was ended, or ended with a message of its own.
    """
    if dist.is_torchelastic_launched():
        _join_torchrun(args, needs_operators)
        main(args)
        dist.destroy_process_group()
        return
    check_gpus(args.num_gpus, needs_operators)
    if args.num_machines > 1 and args.num_gpus == 0 and torch.cuda.is_available():
        raise ConfigError(
            "--num-gpus 0 --num-machines: Detectron2's launch has processes talk by NCCL, which "
            "knows GPUs alone; hide them by the environment variable CUDA_VISIBLE_DEVICES= (empty)."
        )
    try:
        num_processes = max(args.num_gpus, 1)
        is_alone = num_processes * args.num_machines == 1  # then launch starts no other
        with nullcontext() if is_alone else _sigterm_passed_on():
            launch(
                main,
                num_processes,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args,),
            )
    except ProcessExitedException as error:
        if error.signal_name is None:  # it has said why
            sys.exit(error.exit_code)
        sys.exit(
            f"error: process {error.error_index} of this machine was ended by {error.signal_name}, "
            "so the others were, too; --resume goes on from the last checkpoint."
        )


@contextmanager
def _sigterm_passed_on() -> Iterator[None]:
    """Has the processes that were started stop in order at SIGTERM, while this one waits."""

    def pass_on(number: int, frame: Any) -> None:
        children = multiprocessing.active_children()
        for process in children:
            process.terminate()
        if not children:
            sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _join_torchrun(args: argparse.Namespace, needs_operators: bool) -> None:
    """Makes this process part of the group that torchrun describes in the environment."""
    local_size = int(os.environ["LOCAL_WORLD_SIZE"])
    if (args.num_machines, args.machine_rank) != (1, 0) or args.num_gpus not in (0, 1, local_size):
        raise ConfigError(
            "torchrun starts the processes: give it --nnodes, --node-rank and --nproc-per-node, "
            "and leave out --num-machines, --machine-rank and --num-gpus (but for 0: on CPU)."
        )
    use_gpu = args.num_gpus > 0 and torch.cuda.is_available()
    if use_gpu:
        check_gpus(local_size, needs_operators, "--nproc-per-node")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if use_gpu else "gloo", timeout=DEFAULT_TIMEOUT)
    comm.create_local_process_group(local_size)
    comm.synchronize()


def check_gpus(wanted: int, needs_operators: bool = True, option: str = "--num-gpus") -> None:
    """Ends the program where several GPUs are asked for that cannot be used.

    Args:
        wanted: GPUs of this machine.
        needs_operators: False if there may be networks without this package's operators.
        option: what asks for them.
    """
    found = torch.cuda.device_count()
    if wanted > max(found, 1):
        reason = f"this machine has {found}"
    elif wanted > 1 and needs_operators and "cuda" not in built_devices():
        reason = "d2_deform's operators are built for CPU only"
    else:
        return
    sys.exit(f"error: {option} {wanted}: {reason}; --num-gpus 0 trains on CPU.")
