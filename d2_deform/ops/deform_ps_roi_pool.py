"""Deformable position-sensitive RoI pooling."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._arguments import (
    autocast_coordinates,
    autocast_features,
    check_count,
    check_features,
    empty_beside,
    pair,
)
from ._roi_arguments import check_pooling, register_pooling_gradients


def deform_ps_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None = None,
    output_size: int | Sequence[int] = 7,
    group_size: int = 7,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 4,
    gamma: float = 0.1,
    aligned: bool = True,
) -> Tensor:
    """Pools each bin of a box from the map of its position; an offset may move each bin.

    Dai et al., ICCV 2017, section 2.2, "Position-Sensitive (PS) RoI Pooling". Samples, skipping and
    the two conventions are those of :func:`deform_roi_pool`.

    Args:
        input (Tensor[N, C * group_size**2, H, W]): score maps; channel
            (c * group_size + gh) * group_size + gw serves output channel c in grid cell (gh, gw).
            Types and strides as :func:`deform_roi_pool`.
        rois (Tensor[R, 5]): batch index, x1, y1, x2, y2 in input-image pixels. No gradient.
        offset (Tensor[R, 2 * K, Ph, Pw]): shift of each bin in units of the box's width and height,
            before ``gamma``; channel 2k = x, 2k + 1 = y of the k-th of K equal groups of the C
            output channels (K = C: every class its own). None: rigid.
        output_size: bins, P or (Ph, Pw).
        group_size: cells of the position-sensitive grid per axis; bin ph reads its row
            ph * group_size // Ph.
        spatial_scale, sampling_ratio, gamma, aligned: as :func:`deform_roi_pool`.

    Returns:
        Tensor[R, C, Ph, Pw]: of input's type and memory format; computed in float32 at least.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the operators were not built for input's device; or backward of backward.
    """
    check_features("input", input)
    (input,) = autocast_features(input)  # type: ignore[assignment]
    rois = autocast_coordinates(rois, input)  # type: ignore[assignment]
    offset = autocast_coordinates(offset, input)
    pooled = pair("output_size", output_size, 1)
    check_count("group_size", group_size, 1)
    if input.shape[1] % group_size**2:
        raise ValueError(
            f"input: its channels must be a multiple of group_size**2 = {group_size**2}, got "
            f"{tuple(input.shape)}"
        )
    out_channels = input.shape[1] // group_size**2
    check_pooling(input, rois, offset, pooled, out_channels, spatial_scale, sampling_ratio)
    return torch.ops.d2_deform.deform_ps_roi_pool(
        input, rois, offset, *pooled, group_size, spatial_scale, sampling_ratio, gamma, aligned
    )


@torch.library.register_fake("d2_deform::deform_ps_roi_pool")
def _fake(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    pooled_h: int,
    pooled_w: int,
    group_size: int,
    *rest: Any,
) -> Tensor:
    out_channels = input.shape[1] // group_size**2
    return empty_beside(input, (rois.shape[0], out_channels, pooled_h, pooled_w))


register_pooling_gradients("deform_ps_roi_pool")
