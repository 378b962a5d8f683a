"""The CUDA operators' code run on the host.

A plain C++ compiler turns csrc/cuda/*.cu into a library whose kernels are loops, see
csrc/cuda/launch.h, and which checks every access to an array. Its operators are registered under
the dispatch key PrivateUse1, which nothing else uses; `emulated()` lets tensors in the host's
memory go there. What it does not show: launch geometry, shuffles, atomics, streams.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = [
    name + suffix
    for name in ("deform_conv2d", "deform_roi_pool", "deform_ps_roi_pool")
    for suffix in ("", "_backward")
]
FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=fast"),
    *("-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror"),
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


@functools.cache
def build() -> Path:
    """The library, compiled once for each state of the sources."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    depends = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    state = hashlib.sha256(torch.__version__.encode() + " ".join(FLAGS).encode())
    for path in depends:
        state.update(path.read_bytes())
    library = ROOT / "build" / "cuda_emulation" / f"{state.hexdigest()[:16]}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}")
    torch_libraries = [
        option for path in library_paths() for option in (f"-L{path}", f"-Wl,-rpath,{path}")
    ]
    command = [
        *(str(compiler()), *FLAGS),
        *(f"-isystem{path}" for path in include_paths()),
        *("-x", "c++", *map(str, sources), "-x", "none"),
        *(*torch_libraries, "-ltorch_cpu", "-lc10", "-o", str(unfinished)),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for old in library.parent.glob("*.so"):
        old.unlink()
    unfinished.replace(library)
    return library


@contextmanager
def emulated() -> Iterator[None]:
    """Within it, the operators run the CUDA code on tensors in the host's memory."""
    torch.ops.load_library(str(build()))
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)

    def redirected(name: str) -> Callable[..., Any]:
        operator = getattr(torch.ops.d2_deform, name).default
        return lambda *arguments: operator.redispatch(keys, *arguments)

    library = torch.library.Library("d2_deform", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*overriding a previously registered kernel")
        for name in OPERATORS:
            library.impl(name, redirected(name), "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()
