"""The operators on a GPU beside torchvision's, and beside cuDNN's dense convolution.

    python -m benchmarks.cuda [--quick] [--output output/cuda/benchmark.json] [--page FILE]

Times are taken on the GPU by events, medians of 60 calls; what a call takes from Python stands
beside. Several sets of inputs take turns, so that the level-2 cache does not hold them; libraries
take turns, too. The backward pass computes the gradients of input, offset and weight; the dense
convolution and torchvision's pooling have no offsets. The floor of a row is the larger of FLOP by
peak and bytes by bandwidth, both measured in the same run; bytes are those of inputs and outputs,
each moved once. ``--page`` writes the tables between the markers of a Markdown page.
"""

import argparse
import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torchvision

from benchmarks.gpu.case import Case
from benchmarks.gpu.convolution import RES5, convolution_cases
from benchmarks.gpu.pooling import pooling_cases
from benchmarks.gpu.report import judge, report
from benchmarks.gpu.roofline import floor, peaks
from benchmarks.gpu.timing import compare
from benchmarks.run import fill_page
from d2_deform.ops import built_devices

ROOT = Path(__file__).resolve().parents[1]
WORKSPACE = "D2_DEFORM_CUDA_WORKSPACE"


def measure(case: Case, rounds: int, peak: dict[str, float]) -> dict[str, Any]:
    libraries = case.libraries()
    row = {"case": case.name, "absent": libraries.absent, **compare(libraries.sets, rounds)}
    return row | floor(case, peak, row["times"])


def workspace_cases(quick: bool) -> Iterator[tuple[int, Case]]:
    """res5 at batch 8 with columns of so many MiB."""
    for precision in ("bf16",) if quick else ("fp32", "tf32", "bf16"):
        for megabytes in (4, 8, 16, 24, 32, 48, 64, 128, 512):
            for backward in (False, True):
                case = RES5.case(8, precision, backward, f"{megabytes} MiB, {precision}")
                part = f"workspace {case.part.split()[-1]}"
                yield megabytes, replace(case, part=part, alone=True)


def all_cases(quick: bool) -> Iterator[Case]:
    """All cases; those that try a workspace set it while they are measured."""
    yield from convolution_cases(quick)
    yield from pooling_cases(quick)
    before = os.environ.pop(WORKSPACE, None)
    for megabytes, case in workspace_cases(quick):
        os.environ[WORKSPACE] = str(megabytes << 20)
        yield case
    os.environ.pop(WORKSPACE, None)
    if before is not None:
        os.environ[WORKSPACE] = before


def machine() -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "workspace": os.environ.get(WORKSPACE, "default"),
    }


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip() or "not in git"


def main() -> None:
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one size, few rounds, no goals")
    parser.add_argument("--output", type=Path, default=Path("output/cuda/benchmark.json"))
    parser.add_argument("--page", type=Path, metavar="FILE", help="a page to put the tables into")
    args = parser.parse_args()
    if "cuda" not in built_devices():
        raise SystemExit(
            "benchmark: needs a GPU that torch sees and operators built there with CUDA: "
            "`python setup.py build_ext --inplace`"
        )
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    data: dict[str, Any] = {
        "measured": time.strftime("%Y-%m-%d %H:%M"),
        "commit": commit(),
        "machine": machine(),
        "peaks": peaks(),
        "parts": {},
        "goals": [],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for case in all_cases(args.quick):
        row = measure(case, 5 if args.quick else 20, data["peaks"])
        data["parts"].setdefault(case.part, []).append(row)
        if not args.quick:
            data["goals"] += judge(case.part, row)
        args.output.write_text(json.dumps(data, indent=1) + "\n")
        times = {name: round(value["median"], 3) for name, value in row["times"].items()}
        print(f"{case.part}: {case.name}: {times}", flush=True)
    if args.page:
        fill_page(args.page, report(data))
    args.output.with_suffix(".md").write_text(report(data) + "\n")
    print(report(data))


if __name__ == "__main__":
    main()
