"""Random arguments for the two pooling operators, which share most of their contract."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from d2_deform.ops import deform_ps_roi_pool, deform_roi_pool, reference

from .helpers import Arguments, Operator, random

COMPILED: dict[str, Operator] = {
    "deform_roi_pool": deform_roi_pool,
    "deform_ps_roi_pool": deform_ps_roi_pool,
}
REFERENCE: dict[str, Operator] = {
    "deform_roi_pool": reference.deform_roi_pool,
    "deform_ps_roi_pool": reference.deform_ps_roi_pool,
}


def random_rois(count: int, batch: int, size: tuple[int, int], scale: float) -> Tensor:
    """Boxes of all sizes, about a third of them partly outside the image; (count, 5) in float64."""
    image = torch.tensor([size[1], size[0]], dtype=torch.float64) / scale
    centres = torch.rand(count, 2, dtype=torch.float64) * image
    halves = (0.02 + 0.38 * torch.rand(count, 2, dtype=torch.float64)) * image
    indices = torch.randint(max(batch, 1), (count, 1)).double()
    return torch.cat([indices, centres - halves, centres + halves], dim=1)


def make_arguments(
    name: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
    *,
    batch: int = 2,
    rois: int = 5,
    out_channels: int = 4,
    group_size: int = 2,
    output_size: int | tuple[int, int] = (3, 2),
    class_groups: int | None = 2,
    size: tuple[int, int] = (7, 9),
    spatial_scale: float = 0.5,
    sampling_ratio: int = 3,
    gamma: float = 0.3,
    aligned: bool = True,
    coordinate_dtype: torch.dtype | None = None,
) -> Arguments:
    """`class_groups=None`: rigid. `group_size` is left out for the operator that has none."""
    positional = name == "deform_ps_roi_pool"
    channels = out_channels * (group_size**2 if positional else 1)
    bins = (output_size, output_size) if isinstance(output_size, int) else output_size
    coordinates: dict[str, Any] = {"dtype": coordinate_dtype or dtype, "device": device}
    boxes = random_rois(rois, batch, size, spatial_scale)
    arguments: Arguments = {
        "input": random(batch, channels, *size, dtype=dtype, device=device),
        "rois": boxes.to(**coordinates),
        "output_size": output_size,
        "spatial_scale": spatial_scale,
        "sampling_ratio": sampling_ratio,
        "gamma": gamma,
        "aligned": aligned,
    }
    if class_groups is not None:
        arguments["offset"] = random(rois, 2 * class_groups, *bins, **coordinates)
    if positional:
        arguments["group_size"] = group_size
    return arguments
