"""The machine and the versions that figures belong to."""

import functools
import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

import d2_deform
from d2_deform.ops import cpu_capability

from .problem import Absent

__all__ = ["describe_machine", "require_bfloat16"]

LIBRARIES = ("torch", "torchvision", "onnxruntime", "onnx", "detectron2", "sal-detectron2", "numpy")


def describe_machine() -> dict[str, Any]:
    """Processor, kernels, versions. Figures of two runs may be compared where this is equal."""
    return {
        "processor": _cpu_info().get("model name", platform.processor()),
        "cpu family, model, stepping": ", ".join(
            _cpu_info().get(key, "?") for key in ("cpu family", "model", "stepping")
        ),
        "cores": os.cpu_count(),
        "instructions": ", ".join(
            name
            for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
            if name in _cpu_flags()
        ),
        "kernels": cpu_capability(),
        "library": _fingerprint(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version for name in LIBRARIES if (version := _version(name))},
    }


def require_bfloat16() -> None:
    """Raises Absent where the processor has no instructions for bfloat16."""
    if not _cpu_flags() & {"avx512_bf16", "amx_bf16"}:
        raise Absent("this processor has neither AMX nor AVX512-BF16")


@functools.cache
def _cpu_info() -> dict[str, str]:
    """Of the first core."""
    path = Path("/proc/cpuinfo")
    text = path.read_text().partition("\n\n")[0] if path.exists() else ""
    fields = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, _, value in fields}


def _cpu_flags() -> set[str]:
    return set(_cpu_info().get("flags", "").split())


def _fingerprint() -> str:
    """Of the compiled operators: two builds of the same sources may differ."""
    library = min(Path(d2_deform.__file__).parent.glob("_C*.so"))
    return hashlib.sha256(library.read_bytes()).hexdigest()[:12]


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
