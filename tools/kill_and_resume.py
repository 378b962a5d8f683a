#!/usr/bin/env python
"""Kill trainings at random moments, resume them, and compare them with one that was not killed.

    python tools/kill_and_resume.py --kills 20
    python tools/kill_and_resume.py --kills 10 --processes 2
    python tools/kill_and_resume.py --kills 10 --ablation

A tiny deformable R-FCN is trained on a handful of pictures, on CPU with a fixed seed: once without
a break, then again and again with kills, until there were so many: SIGKILL and SIGTERM in turn, to
every process of the run. Weights, optimizer and written losses must be the same bit for bit. With
--processes torchrun starts so many; with --ablation it is tools/run_ablation.py that is killed.
Exits with 1 where anything differs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from glob import glob
from typing import Any

import torch

from d2_deform.data import DeformedDigitsSettings, write_deformed_digits
from d2_deform.engine.command_line import positive

TOOLS = os.path.dirname(os.path.abspath(__file__))
CONFIG = os.path.join(os.path.dirname(TOOLS), "configs", "quickstart.yaml")
TIMES = ("time", "data_time", "rank_data_time", "eta_seconds")  # seconds differ from run to run


def get_parser() -> argparse.ArgumentParser:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=positive, default=20, help="default: 20")
    parser.add_argument(
        "--iterations", type=positive, default=80, help="of a training (default: 80)"
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="of the data loader (default: 2)", metavar="N"
    )
    parser.add_argument(
        "--processes", type=positive, default=1, metavar="N", help="that train (default: 1)"
    )
    parser.add_argument("--ablation", action="store_true", help="kill tools/run_ablation.py")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--output", default="output/kill_and_resume", metavar="FOLDER")
    return parser


def tiny_options(data: str, iterations: int, workers: int) -> list[str]:
    """A network that is trained in seconds, with a checkpoint every tenth of the schedule."""
    return [
        *("DATASETS.VOC_FOLDER.ROOT", data),
        *("DATASETS.TRAIN", "('voc_folder_train',)", "DATASETS.TEST", "('voc_folder_train',)"),
        *("DATALOADER.NUM_WORKERS", str(workers)),
        *("INPUT.MIN_SIZE_TRAIN", "(48, 64)", "INPUT.MIN_SIZE_TEST", "64"),
        *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "8"),
        *("MODEL.RFCN.CONV_DIM", "16", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
        *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.WARMUP_ITERS", "0"),
        *("SOLVER.CHECKPOINT_PERIOD", str(max(iterations // 10, 1))),
    ]


def train_command(
    folder: str, options: Sequence[str], iterations: int, processes: int
) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [
        *(sys.executable, *(launcher if processes > 1 else [])),
        *(os.path.join(TOOLS, "train_net.py"), "--config-file", CONFIG),
        *("--num-gpus", "0", "--resume", *options, "SOLVER.MAX_ITER", str(iterations)),
        *("SEED", "1", "OUTPUT_DIR", folder),
    ]


def ablation_command(folder: str, options: Sequence[str], iterations: int) -> list[str]:
    return [
        *(sys.executable, os.path.join(TOOLS, "run_ablation.py"), "--table", "1"),
        *("--method", "rfcn", "--data", "digits", "--rows", "plain", "dconv3", "--seeds", "1"),
        *("--num-gpus", "0", "--iterations", str(iterations), "--output", folder, *options),
    ]


def run(command: Sequence[str], log: str, seconds: float | None, how: signal.Signals) -> int | None:
    """Runs a command, and kills it and all that it started after so many seconds.

    Returns:
        Its exit status; None where it was still at work when it was killed.
    """
    with open(log, "ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        tree = [process.pid, *list_descendants(process.pid)]
        for pid in tree:
            with suppress(ProcessLookupError):
                os.kill(pid, how)
        process.wait()
        while any(map(is_alive, tree)):  # some write a checkpoint
            time.sleep(0.1)
        return None


def list_descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    children: dict[int, list[int]] = {}
    for stat in glob("/proc/[0-9]*/stat"):
        with suppress(OSError), open(stat) as file:
            number, rest = file.read().split(" ", 1)
            parent = int(rest.rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(number))
    found = []
    waiting = children.get(pid, [])
    while waiting:
        found.append(waiting.pop())
        waiting.extend(children.get(found[-1], []))
    return found


def is_alive(pid: int) -> bool:
    with suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"  # ended, and not yet asked how
    return False


def read_run(folder: str) -> dict[str, Any]:
    """What must not depend on kills: the final checkpoint, and the losses by iteration."""
    checkpoint = torch.load(os.path.join(folder, "model_final.pth"))
    losses: dict[int, dict[str, float]] = {}
    with open(os.path.join(folder, "metrics.json")) as file:
        for line in file:
            with suppress(json.JSONDecodeError):  # a kill cut it off
                record = json.loads(line)
                losses.setdefault(record["iteration"], {}).update(record)
    return {
        "model": checkpoint["model"],
        "optimizer": checkpoint["trainer"]["_trainer"]["optimizer"]["state"],
        "losses": {
            iteration: {name: value for name, value in record.items() if name not in TIMES}
            for iteration, record in losses.items()
        },
    }


def find_differences(folder: str, other: str) -> list[str]:
    """Names what differs between two runs."""
    one, two = read_run(folder), read_run(other)
    # A run that SIGTERM stopped has also written the losses of the iteration where it stopped.
    one["losses"] = {key: one["losses"].get(key) for key in two["losses"]}
    differences = []
    for part in ("model", "optimizer", "losses"):
        try:
            torch.testing.assert_close(one[part], two[part], rtol=0, atol=0, equal_nan=True)
        except AssertionError as error:
            differences.append(f"{part} ({str(error).splitlines()[0]})")
    return differences


def last_checkpoint(folder: str) -> str:
    with suppress(FileNotFoundError), open(os.path.join(folder, "last_checkpoint")) as file:
        return file.read()
    return "none"


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    shutil.rmtree(args.output, ignore_errors=True)
    data = os.path.join(args.output, "data")
    os.makedirs(args.output)
    small = DeformedDigitsSettings(image_size=64, min_height=0.3)
    write_deformed_digits(data, "train", 9, settings=small)
    options = tiny_options(data, args.iterations, args.workers)
    build = ablation_command
    if not args.ablation:
        build = partial(train_command, processes=args.processes)
    runs = [os.path.join("runs", f"{row}_seed1") for row in ("plain", "dconv3")]
    parts = runs if args.ablation else [""]
    generator = random.Random(args.seed)

    whole = os.path.join(args.output, "unbroken")
    log = os.path.join(args.output, "output.log")
    start = time.monotonic()
    if run(build(whole, options, args.iterations), log, None, signal.SIGKILL) != 0:
        sys.exit(f"error: the run without kills failed; see {log}")
    seconds = time.monotonic() - start
    print(f"without kills: {seconds:.0f} s", flush=True)

    kills, number, failed = 0, 0, False
    while kills < args.kills:
        number += 1
        folder = os.path.join(args.output, f"killed_{number}")
        status = None
        while status is None:
            how = signal.SIGKILL if kills % 2 == 0 else signal.SIGTERM
            left = generator.uniform(0.05, 1.0) * seconds if kills < args.kills else None
            status = run(build(folder, options, args.iterations), log, left, how)
            if status is None:
                kills += 1
                reached = ", ".join(last_checkpoint(os.path.join(folder, part)) for part in parts)
                print(f"kill {kills}: {how.name} after {left:.1f} s, {reached}", flush=True)
            elif status != 0:
                sys.exit(f"error: exit status {status}; see {log}")
        for part in parts:
            differences = find_differences(os.path.join(folder, part), os.path.join(whole, part))
            failed |= bool(differences)
            verdict = (
                f"DIFFERS: {', '.join(differences)}" if differences else "the same, bit for bit"
            )
            print(f"run {number}{' ' if part else ''}{part}: {verdict}", flush=True)
    print(f"{kills} kills in {number} runs")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
