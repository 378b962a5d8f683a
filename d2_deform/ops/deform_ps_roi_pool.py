"""Deformable position-sensitive RoI pooling."""

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
from .deform_roi_pool import fake_gradients


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
    check_tensor("input", input)
    (input,) = autocast_features(input)  # type: ignore[assignment]
    offset = at_least_float32(offset, input)
    rois = at_least_float32(rois, input)  # type: ignore[assignment]
    pooled = pair("output_size", output_size, 1)
    if not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size: expected an int of at least 1, got {group_size!r}")
    if input.dim() == 4 and (input.shape[1] == 0 or input.shape[1] % group_size**2):
        raise ValueError(
            f"input: its channels must be a multiple of group_size**2 = {group_size**2}, got "
            f"{tuple(input.shape)}"
        )
    out_channels = input.shape[1] // group_size**2
    check_pooling(input, rois, offset, pooled, out_channels, sampling_ratio)
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
    return torch.empty(
        (rois.shape[0], input.shape[1] // group_size**2, pooled_h, pooled_w),
        dtype=input.dtype,
        device=input.device,
        memory_format=suggested_format(input),
    )


@torch.library.register_fake("d2_deform::deform_ps_roi_pool_backward")
def _fake_backward(
    grad_output: Tensor, input: Tensor, rois: Tensor, offset: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    return fake_gradients(input, rois, offset, *rest[-2:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, rois, offset, _, _, *rule = inputs
    ctx.save_for_backward(input, rois, offset)
    ctx.rule = rule


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    need_input, _, need_offset = ctx.needs_input_grad[:3]
    grad_input, grad_offset = torch.ops.d2_deform.deform_ps_roi_pool_backward(
        grad_output, *ctx.saved_tensors, *ctx.rule, need_input, need_offset
    )
    return (
        grad_input if need_input else None,
        None,
        grad_offset if need_offset else None,
        *(None,) * 7,
    )


torch.library.register_autograd(
    "d2_deform::deform_ps_roi_pool", _backward, setup_context=_setup_context
)
register_no_double_backward("deform_ps_roi_pool_backward")
