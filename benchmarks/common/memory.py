"""Memory that a call takes beyond its inputs and outputs, from the kernel's own count.

Every measurement is a process of its own, forked from one that has computed nothing, so that no
buffer of an earlier call is there to be used again. The peak of resident memory is reset
(/proc/self/clear_refs) before the call and read (VmHWM) after it; the inputs, the outputs and pages
of code that were loaded meanwhile are subtracted. All blocks above 64 KB go back to the system
when they are freed (MALLOC_MMAP_THRESHOLD_) and huge pages are off, so that what is counted is
what was touched; the kernel itself counts to about 0.3 MB for each core.

A buffer that a library keeps from the forward pass for later counts in the backward pass.

    python -m benchmarks.common.memory MODULE SERIES THREADS [--quick]

prints a line of JSON for each size of a series, pass and library.
"""

import argparse
import ctypes
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from .problem import Absent, Case, Operator, Problem, Series

__all__ = ["measure_memory"]

ROOT = Path(__file__).resolve().parents[2]
PR_SET_THP_DISABLE = 41
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
NO_CACHES = {"MKL_DISABLE_FAST_MM": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
FORWARD_PEERS = ("ours", "torchvision", "onnxruntime", "dense")
BACKWARD_PEERS = ("ours",)  # torchvision's takes minutes at the larger sizes


def measure_memory(
    operator: Operator, series: Series, threads: int, quick: bool
) -> Iterator[dict[str, Any]]:
    """Measures every size of one of ``operator.memory``, each in a process of its own.

    Yields:
        "factor", "case", "pass", "peer" and "megabytes" or "absent", the reason; neither
        where a library has no such operator.

    Raises:
        Absent: this system does not count so.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise Absent("peaks of memory are read from /proc, which is there on Linux only")
    names = [operator.module, series.name, str(threads)]
    command = [sys.executable, "-W", "ignore", "-m", __name__, *names]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **MALLOC, **NO_CACHES, "PYTHONPATH": path}
    flags = ["--quick"] if quick else []
    with subprocess.Popen(
        command + flags, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode:
        raise RuntimeError(f"measuring memory failed: {' '.join(command + flags)}")


def _measure_all(series: Series, threads: int) -> None:
    for factor, case in series.cases.items():
        for name, peers in (("forward", FORWARD_PEERS), ("backward", BACKWARD_PEERS)):
            for peer in peers:
                key = {"factor": factor, "case": case.name, "pass": name, "peer": peer}
                found = _in_a_fork(case, peer, name, threads)
                print(json.dumps({**key, **found}), flush=True)


def _in_a_fork(case: Case, peer: str, name: str, threads: int) -> dict[str, Any]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        status = 1
        try:
            os.write(writer, json.dumps(_measure(case, peer, name, threads)).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(f"{peer}, {case.name}, {name}: the process that measures it has failed")
    return json.loads(text)


def _measure(case: Case, peer: str, name: str, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    problem = case.build()
    if peer not in problem.calls:
        return {"absent": problem.absent[peer]} if peer in problem.absent else {}
    _start_threads()
    return {"megabytes": _peak(problem, peer, name) / 1e6}


def _peak(problem: Problem, peer: str, name: str) -> int:
    """Bytes beyond inputs and outputs."""
    call = problem.calls[peer]
    before = _status()
    if name == "forward":
        _reset_peak()
        with torch.no_grad():
            results = [call()]
    else:
        output = call()
        grad_output = torch.randn_like(output)
        before["VmRSS"] += output.nbytes + grad_output.nbytes  # inputs of this pass
        _reset_peak()
        grads = torch.autograd.grad(output, problem.leaves, grad_output, allow_unused=True)
        results = [grad for grad in grads if grad is not None]
    after = _status()
    code = after["RssFile"] - before["RssFile"]
    return after["VmHWM"] - before["VmRSS"] - code - sum(result.nbytes for result in results)


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _start_threads() -> None:
    """Lets torch start its threads, and import what its first gradient needs (tens of MB)."""
    torch.zeros(1 << 20).add_(1)
    x = torch.zeros(1, 16, 16, 16, requires_grad=True)
    output = F.conv2d(x, x[:, :, :3, :3].detach())
    torch.autograd.grad(output, [x], torch.ones_like(output), allow_unused=True)


def _status() -> dict[str, int]:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): 1024 * int(number) for name, number, _ in fields}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("module")
    parser.add_argument("series")
    parser.add_argument("threads", type=int)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    operator = importlib.import_module(args.module).operator(args.quick)
    _measure_all(next(s for s in operator.memory if s.name == args.series), args.threads)
