from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return ["cpu"]
    import d2_deform.ops  # noqa: F401  loads the compiled library, with or without its CUDA part

    built = torch._C._dispatch_has_kernel_for_dispatch_key("d2_deform::deform_conv2d", "CUDA")
    return ["cpu", "cuda"] if built else ["cpu"]


@pytest.fixture(params=_devices())
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    # On CUDA the backward promises bit-equal results only then.
    torch.use_deterministic_algorithms(request.param == "cuda", warn_only=True)
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _same_random_numbers_every_time() -> None:
    torch.manual_seed(0)
