"""Deformable RoI pooling."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._arguments import (
    autocast_coordinates,
    autocast_features,
    check_features,
    empty_beside,
    pair,
)
from ._roi_arguments import check_pooling, register_pooling_gradients


def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None = None,
    output_size: int | Sequence[int] = 7,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 4,
    gamma: float = 0.1,
    aligned: bool = True,
) -> Tensor:
    """Averages each bin of a box over a grid of samples; an offset may move each bin.

    Dai et al., ICCV 2017, section 2.2, equation 5. A bin's value is the mean of its
    ``sampling_ratio**2`` bilinear samples; those outside [-0.5, H - 0.5] x [-0.5, W - 0.5] are
    skipped and not counted, a bin without any is 0. Boxes are at least 0.1 cell wide and high.

    Args:
        input (Tensor[N, C, H, W]): float64, float32, float16 or bfloat16; any strides.
        rois (Tensor[R, 5]): batch index, x1, y1, x2, y2 in input-image pixels. Of input's type, or
            float32 beside a half type. A box whose batch index does not exist gives zeros. No
            gradient.
        offset (Tensor[R, 2 * K, Ph, Pw]): shift of each bin in units of the box's width and height,
            before ``gamma``; channel 2k = x, 2k + 1 = y of the k-th of K equal groups of channels.
            None: rigid.
        output_size: bins, P or (Ph, Pw).
        spatial_scale: cells per pixel of the input image, e.g. 1/16.
        sampling_ratio: samples per bin and axis.
        gamma: factor of the offsets (0.1 in the paper).
        aligned: True: Detectron2's continuous coordinates (x * scale - 0.5, samples at the centres
            of their part of the bin). False: the official release's rule (corners rounded, end + 1,
            samples at the upper left of their part, zero derivative at whole numbers), for weights
            trained with it.

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
    check_pooling(input, rois, offset, pooled, input.shape[1], spatial_scale, sampling_ratio)
    return torch.ops.d2_deform.deform_roi_pool(
        input, rois, offset, *pooled, spatial_scale, sampling_ratio, gamma, aligned
    )


@torch.library.register_fake("d2_deform::deform_roi_pool")
def _fake(
    input: Tensor, rois: Tensor, offset: Tensor | None, pooled_h: int, pooled_w: int, *rest: Any
) -> Tensor:
    return empty_beside(input, (rois.shape[0], input.shape[1], pooled_h, pooled_w))


register_pooling_gradients("deform_roi_pool")
