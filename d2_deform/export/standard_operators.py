"""The deformable operators written in operators that ONNX has.

Each function has the arguments of the operator of ``torch.ops.d2_deform`` that it stands for, and
its values. :class:`StandardOperators` puts them in its place.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torchvision.ops import deform_conv2d as standard_deform_conv2d
from torchvision.ops import roi_align

__all__ = ["StandardOperators", "deform_conv2d", "deform_ps_roi_pool", "deform_roi_pool"]

MIN_ROI_SIZE = 0.1  # cells, as the operators have it
FAR = 1e6  # cells; a bin that lies further away, or nowhere, holds no sample


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride_y: int,
    stride_x: int,
    padding_y: int,
    padding_x: int,
    dilation_y: int,
    dilation_x: int,
) -> Tensor:
    """torchvision's operator, which ONNX has as DeformConv (opset 19)."""
    return standard_deform_conv2d(
        input,
        offset,
        weight,
        bias,
        (stride_y, stride_x),
        (padding_y, padding_x),
        (dilation_y, dilation_x),
        mask,
    )


def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    pooled_h: int,
    pooled_w: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
    aligned: bool,
) -> Tensor:
    """:func:`deform_ps_roi_pool` with one part."""
    rule = (spatial_scale, sampling_ratio, gamma, aligned)
    return deform_ps_roi_pool(input, rois, offset, pooled_h, pooled_w, 1, *rule)


def deform_ps_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    pooled_h: int,
    pooled_w: int,
    group_size: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
    aligned: bool,
) -> Tensor:
    """RoIAlign of every single bin, moved as its offset says, on the map that it reads.

    RoIAlign counts a sample outside [-1, H] as 0, ours leaves out a sample outside
    [-0.5, H - 0.5]. On maps twice as fine, 2 H - 1 cells with the halfway values in between, both
    are the same bilinear function and the two limits fall together (-0.5 becomes -1, H - 0.5
    becomes 2 H - 1). The number of samples inside then turns RoIAlign's mean over all samples into
    the mean over those.

    Boxes are finite and their picture exists, as a detector's are.
    """
    height, width = input.shape[2:]
    count, parts = rois.shape[0], group_size**2
    channels = input.shape[1] // parts
    classes = 1 if offset is None else offset.shape[1] // 2

    def along(axis: int, bins: int, bin_index: Tensor, cells: int) -> tuple[Tensor, Tensor, Tensor]:
        """Limits of the bins on the fine maps and the samples inside, (R, K, Ph, Pw) each."""
        first, last = rois[:, 1 + axis], rois[:, 3 + axis]
        if aligned:
            start, end = first * spatial_scale - 0.5, last * spatial_scale - 0.5
        else:
            start = _round_half_away(first) * spatial_scale - 0.5
            end = (_round_half_away(last) + 1) * spatial_scale - 0.5
        size = (end - start).clamp(min=MIN_ROI_SIZE)[:, None, None, None]
        low = start[:, None, None, None] + bin_index * (size / bins)
        if offset is not None:
            low = low + offset[:, axis::2] * (gamma * size)
        low = torch.where(low.abs() < FAR, low, -FAR)
        if not aligned:  # samples at the upper left of their part, not in its middle
            low = low - size / (2 * bins * sampling_ratio)
        high = low + size / bins
        within = (torch.arange(sampling_ratio, device=rois.device) + 0.5) / sampling_ratio
        samples = low[..., None] + within * (size / bins)[..., None]
        inside = (samples >= -0.5) & (samples <= cells - 0.5)
        return 2 * low + 0.5, 2 * high + 0.5, inside.sum(dim=-1)

    bin_y = torch.arange(pooled_h, device=rois.device)[:, None]
    bin_x = torch.arange(pooled_w, device=rois.device)[None, :]
    x1, x2, inside_x = along(0, pooled_w, bin_x, width)
    y1, y2, inside_y = along(1, pooled_h, bin_y, height)

    # Maps one behind the other: by picture, class and part
    part = bin_y * group_size // pooled_h * group_size + bin_x * group_size // pooled_w
    class_index = torch.arange(classes, device=rois.device)[:, None, None]
    first_map = (rois[:, 0] * (classes * parts))[:, None, None, None]
    maps_read = first_map + class_index * parts + part
    limits = torch.broadcast_tensors(maps_read, x1, y1, x2, y2)
    bins = torch.stack(limits, dim=-1).reshape(-1, 5)
    maps = input.reshape(-1, channels // classes, parts, height, width).transpose(1, 2)
    maps = maps.reshape(-1, channels // classes, height, width)
    fine = (2 * height - 1, 2 * width - 1)
    maps = F.interpolate(maps, size=fine, mode="bilinear", align_corners=True)

    means = roi_align(maps, bins, 1, 1.0, sampling_ratio, aligned=True)
    means = means.reshape(count, classes, pooled_h, pooled_w, channels // classes)
    factor = sampling_ratio**2 / (inside_x * inside_y).clamp(min=1)
    pooled = means * factor[..., None]
    return pooled.permute(0, 1, 4, 2, 3).reshape(count, channels, pooled_h, pooled_w)


def _round_half_away(values: Tensor) -> Tensor:
    """C's round(): halves go away from zero."""
    return values.sign() * (values.abs() + 0.5).floor()


_operators = torch.ops.d2_deform
_STANDARD: dict[Any, Callable[..., Tensor]] = {
    _operators.deform_conv2d: deform_conv2d,
    _operators.deform_roi_pool: deform_roi_pool,
    _operators.deform_ps_roi_pool: deform_ps_roi_pool,
}


class StandardOperators(TorchFunctionMode):
    """While it is on, the deformable operators are made of standard ones.

    >>> with StandardOperators():
    ...     program = torch.export.export(network, (image,))
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return _STANDARD.get(func, func)(*args, **(kwargs or {}))
