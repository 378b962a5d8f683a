from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from .emulation import compiler, emulated

# torch asks for it before it takes cuBLAS for deterministic; read when cuBLAS starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def require_cuda() -> None:
    """Skips the test where it cannot run on a GPU."""
    import d2_deform.ops

    if not torch.cuda.is_available():
        pytest.skip("not run on a GPU, none of the operators' tests: torch sees none")
    if "cuda" not in d2_deform.ops.built_devices():
        pytest.skip("not run on the GPU: the operators were built without CUDA")


# The CUDA code in loops on the host: in one process, which compiles it.
EMULATED = pytest.param(
    "emulated",
    marks=[
        pytest.mark.xdist_group("cuda_emulation"),
        pytest.mark.skipif(compiler() is None, reason="no C++ compiler for the emulation"),
    ],
)


GPUS = ["cuda"] if torch.cuda.is_available() else []


@pytest.fixture(params=["cpu", EMULATED, *GPUS])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where a test of the operators runs: the CPU's kernels; those for GPUs on the host, on CPU
    tensors; those for GPUs. The latter two promise bit-equal results only in deterministic mode,
    and so are tested in it; test_cuda.py tests the other one."""
    if request.param == "cpu":
        yield "cpu"
        return
    if request.param == "cuda":
        require_cuda()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        if request.param == "emulated":
            with emulated():
                yield "cpu"
        else:
            yield "cuda"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _same_random_numbers_every_time() -> None:
    torch.manual_seed(0)
