"""What a bug report needs: ``python -m d2_deform.collect_env``.

Where ``import d2_deform`` itself fails, run this file by its path: it needs torch alone, and tells
why the operators do not load.
"""

import importlib.metadata
import json
import os
import sys
from pathlib import Path

import torch

__all__ = ["collect_env_info"]

_PACKAGE = Path(__file__).resolve().parent
_SETTINGS = (
    "D2_DEFORM_CPU_CAPABILITY",
    "D2_DEFORM_CACHE",
    "DETECTRON2_DATASETS",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)
# Some are not needed by all, so that a report tells whether they are there.
_BESIDE = ["torch", "torchvision", "numpy", "fvcore", "opencv-python-headless", "opencv-python"]
_BESIDE += ["scikit-learn", "onnx", "onnxruntime", "timm", "setuptools"]


def collect_env_info() -> str:
    """The plugin, its libraries, how they were built and what they chose; versions beside it; then
    Detectron2's own report, or torch's where there is no Detectron2."""
    rows = [("d2_deform", f"{_version('d2_deform')} @{_PACKAGE}"), *_libraries(), *_build()]
    rows += [(name, _version(name)) for name in _BESIDE]
    rows.append(("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"))
    rows += [(name, os.environ[name]) for name in _SETTINGS if name in os.environ]
    return "\n".join(f"{name:<24}{value}" for name, value in rows) + "\n\n" + _host()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _libraries() -> list[tuple[str, str]]:
    cuda = sorted(path.name for path in _PACKAGE.glob("_C_cuda*.so"))
    cpu = sorted({path.name for path in _PACKAGE.glob("_C*.so")} - set(cuda))
    rows = [
        ("CPU operators", ", ".join(cpu) or "not built"),
        ("CUDA operators", ", ".join(cuda) or "not built"),
    ]
    try:
        from d2_deform import ops

        rows.append(("operators run on", ", ".join(sorted(ops.built_devices()))))
        rows.append(("CPU capability", ops.cpu_capability()))
    except (ImportError, OSError, RuntimeError) as error:
        rows.append(("operators", f"do not load: {error}"))
    return rows


def _build() -> list[tuple[str, str]]:
    """What setup.py left beside the libraries."""
    path = _PACKAGE / "_C_build.json"
    if not path.exists():
        return [("built with", f"not known: no {path.name}")]
    build = json.loads(path.read_text())
    rows = [("built with", f"torch {build['torch']}, {build['compiler']}")]
    for library, flags in build["flags"].items():
        rows.append((f"flags of {library.rpartition('.')[2]}", _flags(flags)))
    if build["cuda"]:
        rows.append(("built for CUDA", ", ".join(f"{k}: {v}" for k, v in build["cuda"].items())))
    return rows


def _flags(flags: list[str] | dict[str, list[str]]) -> str:
    if isinstance(flags, dict):
        return "; ".join(f"{compiler}: {' '.join(own)}" for compiler, own in flags.items() if own)
    return " ".join(flags)


def _host() -> str:
    try:
        from detectron2.utils import collect_env
    except ImportError:
        from torch.utils import collect_env as torch_collect_env

        return torch_collect_env.get_pretty_env_info()
    return collect_env.collect_env_info()


if __name__ == "__main__":
    if not __package__:  # run by its path, which makes this folder the first to import from
        sys.path[0] = str(_PACKAGE.parent)
    print(collect_env_info())
