#!/usr/bin/env python
"""On a machine with a GPU: build the CUDA operators, test, sanitize and benchmark them.

    python tools/check_cuda.py [--steps build tests memcheck racecheck benchmark] [--quick]
        [--output output/cuda] [--page docs/benchmarks/cuda.md]

Needs torch with CUDA, torchvision, pytest and nvcc; without compute-sanitizer two steps are absent.
Every step has a log in the output folder; summary.json says what came of it; benchmark.json has the
figures, and ``--page`` puts their tables into that page.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# Every kernel once, on odd sizes, both ways of summing gradients: what the sanitizers watch.
SMALL_CASE = """
import torch
from d2_deform.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_pool

def gradients(output, leaves):
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        torch.autograd.grad(output, leaves, torch.randn_like(output), retain_graph=True)
    torch.use_deterministic_algorithms(False)

def normal(*shape, dtype):
    return torch.randn(*shape, device="cuda").to(dtype).requires_grad_()

for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
    for channels, groups, deform_groups in ((16, 1, 2), (16, 16, 1), (6, 2, 3)):
        x = normal(2, channels, 7, 9, dtype=dtype)
        weight = normal(channels, channels // groups, 3, 2, dtype=dtype)
        offset = normal(2, 12 * deform_groups, 7, 10, dtype=dtype)
        mask = normal(2, 6 * deform_groups, 7, 10, dtype=dtype)
        bias = normal(channels, dtype=dtype)
        output = deform_conv2d(x, offset, weight, bias, padding=1, mask=mask)
        gradients(output, [x, offset, weight, bias, mask])
    rois = torch.tensor([[0, 1, 1, 9, 8], [1, -3, 2, 30, 5], [7, 0, 0, 1, 1]], device="cuda")
    offset = normal(3, 4, 3, 2, dtype=dtype)
    for channels in (6, 16):
        x = normal(2, channels, 7, 9, dtype=dtype)
        gradients(deform_roi_pool(x, rois.to(dtype), offset, (3, 2), 0.5), [x, offset])
    x = normal(2, 16, 7, 9, dtype=dtype)
    gradients(deform_ps_roi_pool(x, rois.to(dtype), offset, (3, 2), 2, 0.5), [x, offset])
torch.cuda.synchronize()
print("small case done")
"""


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """What each step runs."""
    python = [sys.executable]
    sanitizer = ["compute-sanitizer", "--error-exitcode=1", "--tool"]
    small_case = [*python, "-c", SMALL_CASE]
    benchmark = [*python, "-m", "benchmarks.cuda", "--output", str(args.output / "benchmark.json")]
    benchmark += ["--quick"] * args.quick + (["--page", str(args.page)] if args.page else [])
    tests = ["tests/ops", "-k", "cuda and not emulated", f"--junitxml={args.output / 'tests.xml'}"]
    return {
        "build": [*python, "setup.py", "build_ext", "--inplace"],
        "tests": [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        "memcheck": [*sanitizer, "memcheck", *small_case],
        "racecheck": [*sanitizer, "racecheck", *small_case],
        "benchmark": benchmark,
    }


def run(name: str, command: list[str], folder: Path) -> dict[str, Any]:
    """One step; its output goes to <folder>/<name>.log."""
    if shutil.which(command[0]) is None:
        return {"step": name, "result": f"absent: {command[0]} is not on the PATH"}
    environment = {**os.environ, "FORCE_CUDA": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    if name in ("memcheck", "racecheck"):
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each tensor has its own allocation
    start = time.monotonic()
    with (folder / f"{name}.log").open("w") as log:
        code = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        ).returncode
    lines = (folder / f"{name}.log").read_text().splitlines()
    return {
        "step": name,
        "result": "passed" if code == 0 else f"FAILED with status {code}",
        "seconds": round(time.monotonic() - start, 1),
        "last line": lines[-1][:200] if lines else "",
    }


def main() -> None:
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = ["build", "tests", "memcheck", "racecheck", "benchmark"]
    parser.add_argument("--steps", nargs="+", choices=steps, default=steps, help="(default: all)")
    parser.add_argument("--quick", action="store_true", help="a small benchmark")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "cuda", metavar="FOLDER")
    parser.add_argument("--page", type=Path, metavar="FILE", help="a page for the tables")
    args = parser.parse_args()
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(
            "check_cuda: torch sees no GPU here. What can be checked without one - that the CUDA "
            "library compiles, and its code in loops on the host - is part of `make test`"
        )
    results = []
    for name in args.steps:
        print(f"check_cuda: {name} ...", flush=True)
        results.append(run(name, commands(args)[name], args.output))
        print(f"check_cuda: {results[-1]}", flush=True)
        summary = {
            "measured": time.strftime("%Y-%m-%d %H:%M"),
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "steps": results,
        }
        (args.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    failed = [result["step"] for result in results if "FAILED" in result["result"]]
    print(f"check_cuda: logs and JSON in {args.output}" + f"; FAILED: {failed}" * bool(failed))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
