"""What the GPU at hand can do at best, measured in the same run."""

from typing import Any

import torch

from .case import PRECISIONS, Case, set_precision
from .timing import gpu_times

__all__ = ["floor", "peaks"]


def peaks() -> dict[str, float]:
    """FLOP/s of a product of 8192 x 8192 for each precision; bytes/s of a copy ("bandwidth")."""
    found = {}
    for name in PRECISIONS:
        dtype = set_precision(name)
        a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
        milliseconds = min(gpu_times([lambda a=a, b=b: a @ b], 10))  # type: ignore[misc]
        found[name] = 2 * 8192**3 / (1e-3 * milliseconds)
    source = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    milliseconds = min(gpu_times([lambda: target.copy_(source)], 10))
    found["bandwidth"] = 2 * source.numel() / (1e-3 * milliseconds)
    return found


def floor(case: Case, peak: dict[str, float], times: dict[str, Any]) -> dict[str, Any]:
    """The least time that the case could take here, and what share of it ours reaches."""
    least = 1e3 * max(case.flop / peak[case.precision], case.moved / peak["bandwidth"])
    ours = times.get("ours")
    return {
        "flop": case.flop,
        "bytes": case.moved,
        "floor": least,
        "share": least / ours["median"] if ours else None,
    }
