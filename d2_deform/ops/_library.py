"""Loads the compiled operators and tells for which devices they were built."""

from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent.parent


def _load() -> frozenset[str]:
    cuda = sorted(_PACKAGE.glob("_C_cuda*.so"))
    cpu = sorted(set(_PACKAGE.glob("_C*.so")) - set(cuda))
    if not cpu:
        raise ImportError(
            f"d2_deform: the compiled operators (_C*.so) are not in {_PACKAGE}; build them with "
            "`pip install --no-build-isolation .` or `python setup.py build_ext --inplace`"
        )
    torch.ops.load_library(str(cpu[0]))
    if not cuda or not torch.cuda.is_available():
        return frozenset({"cpu", "meta"})
    torch.ops.load_library(str(cuda[0]))
    return frozenset({"cpu", "meta", "cuda"})


_DEVICES = _load()


def built_devices() -> frozenset[str]:
    """Types of the devices that the operators run on: "cpu", "meta", and "cuda" where built."""
    return _DEVICES


def cpu_capability() -> str:
    """The instruction set that the CPU kernels use: "default", "avx2" or "avx512".

    The environment variable ``D2_DEFORM_CPU_CAPABILITY`` forces a smaller one; it is read once.
    """
    return torch.ops.d2_deform.cpu_capability()
