"""Deformable RoI pooling."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._arguments import (
    at_least_float32,
    autocast_features,
    check_tensor,
    pair,
    register_no_double_backward,
    suggested_format,
)
from ._roi_arguments import check_pooling


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
    check_tensor("input", input)
    (input,) = autocast_features(input)  # type: ignore[assignment]
    offset = at_least_float32(offset, input)
    pooled = pair("output_size", output_size, 1)
    rois = at_least_float32(rois, input)  # type: ignore[assignment]
    check_pooling(input, rois, offset, pooled, input.shape[1], sampling_ratio)
    return torch.ops.d2_deform.deform_roi_pool(
        input, rois, offset, *pooled, spatial_scale, sampling_ratio, gamma, aligned
    )


@torch.library.register_fake("d2_deform::deform_roi_pool")
def _fake(
    input: Tensor, rois: Tensor, offset: Tensor | None, pooled_h: int, pooled_w: int, *rest: Any
) -> Tensor:
    return torch.empty(
        (rois.shape[0], input.shape[1], pooled_h, pooled_w),
        dtype=input.dtype,
        device=input.device,
        memory_format=suggested_format(input),
    )


@torch.library.register_fake("d2_deform::deform_roi_pool_backward")
def _fake_backward(
    grad_output: Tensor, input: Tensor, rois: Tensor, offset: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    return fake_gradients(input, rois, offset, *rest[-2:])


def fake_gradients(
    input: Tensor, rois: Tensor, offset: Tensor | None, need_input: bool, need_offset: bool
) -> tuple[Tensor, Tensor]:
    """What a pooling's backward returns: a gradient that is not asked for is an empty tensor."""
    grad_input = (
        torch.empty(
            input.shape,
            dtype=input.dtype,
            device=input.device,
            memory_format=suggested_format(input),
        )
        if need_input
        else input.new_empty(0)
    )
    grad_offset = (
        offset.new_empty(offset.shape) if need_offset and offset is not None else rois.new_empty(0)
    )
    return grad_input, grad_offset


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, rois, offset, _, _, *rule = inputs
    ctx.save_for_backward(input, rois, offset)
    ctx.rule = rule


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    need_input, _, need_offset = ctx.needs_input_grad[:3]
    grad_input, grad_offset = torch.ops.d2_deform.deform_roi_pool_backward(
        grad_output, *ctx.saved_tensors, *ctx.rule, need_input, need_offset
    )
    return (
        grad_input if need_input else None,
        None,
        grad_offset if need_offset else None,
        *(None,) * 6,
    )


torch.library.register_autograd(
    "d2_deform::deform_roi_pool", _backward, setup_context=_setup_context
)
register_no_double_backward("deform_roi_pool_backward")
