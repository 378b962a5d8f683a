"""Deformable convolution, v1 and v2 (modulated)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._arguments import (
    autocast_coordinates,
    autocast_features,
    check_beside,
    check_features,
    check_shape,
    empty_beside,
    pair,
    register_no_double_backward,
)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = (1, 1),
    padding: int | Sequence[int] = (0, 0),
    dilation: int | Sequence[int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """Convolution whose taps are each moved by an offset of their own; a drop-in for torchvision's.

    ``output[n, o](p) = bias[o] + sum over k and c of
    weight[o, c, k] * mask[n, k](p) * input[n, c](p + p_k + offset[n, k](p))``:
    Dai et al., ICCV 2017, equation 2; with ``mask`` Zhu et al., CVPR 2019, equation 1. ``input`` is
    read bilinearly; a tap counts where -1 < y < H and -1 < x < W, cells outside the map are 0.

    Args:
        input (Tensor[N, C, H, W]): float64, float32, float16 or bfloat16; any strides.
        offset (Tensor[N, 2 * G * kh * kw, Ho, Wo]): in cells of ``input``; per deformable group,
            per tap (row by row), first y then x. Of input's type, or float32 beside a half type.
            C must be a multiple of G.
        weight (Tensor[O, C / groups, kh, kw]): of input's type.
        bias (Tensor[O]): of input's type.
        stride, padding, dilation: an int or (vertical, horizontal).
        mask (Tensor[N, G * kh * kw, Ho, Wo]): factor of each tap (v2); types as ``offset``.

    Returns:
        Tensor[N, O, Ho, Wo]: of input's type and memory format. Coordinates are computed and sums
        are kept in float32 at least.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the operators were not built for input's device; or backward of backward.

    A NaN or infinite offset places its tap outside the map. Under autocast input, weight and bias
    are cast, offset and mask are not.
    """
    check_features("input", input)
    input, weight, bias = autocast_features(input, weight, bias)  # type: ignore[assignment]
    offset = autocast_coordinates(offset, input)  # type: ignore[assignment]
    mask = autocast_coordinates(mask, input)
    stride, padding = pair("stride", stride, 1), pair("padding", padding, 0)
    dilation = pair("dilation", dilation, 1)
    _check(input, offset, weight, bias, mask)
    kh, kw = weight.shape[-2:]
    out = _output_size(input, weight, stride, padding, dilation)
    if out[0] <= 0 or out[1] <= 0:
        raise ValueError(
            f"input: {tuple(input.shape[-2:])} is too small for a {kh}x{kw} kernel with padding "
            f"{padding} and dilation {dilation}: no output is left"
        )
    check_shape("offset", offset, (input.shape[0], offset.shape[1], *out), "(N, 2*G*kh*kw, Ho, Wo)")
    if mask is not None:
        groups_taps = offset.shape[1] // 2
        check_shape("mask", mask, (input.shape[0], groups_taps, *out), "(N, G*kh*kw, Ho, Wo)")
    return torch.ops.d2_deform.deform_conv2d(
        input, offset, weight, bias, mask, *stride, *padding, *dilation
    )


def _check(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None
) -> None:
    check_beside("offset", offset, input, float32_too=True)
    check_beside("weight", weight, input, float32_too=False)
    channels = input.shape[1]
    if weight.dim() != 4:
        raise ValueError(f"weight: expected shape (O, C/groups, kh, kw), got {tuple(weight.shape)}")
    if 0 in weight.shape or channels % weight.shape[1]:
        raise ValueError(
            f"weight: its size(1) must divide input's {channels} channels, got "
            f"{tuple(weight.shape)}"
        )
    groups = channels // weight.shape[1]
    if weight.shape[0] % groups:
        raise ValueError(
            f"weight: its size(0) must be a multiple of the {groups} groups that its size(1) "
            f"gives, got {tuple(weight.shape)}"
        )
    taps = weight.shape[2] * weight.shape[3]
    if offset.dim() != 4 or offset.shape[1] == 0 or offset.shape[1] % (2 * taps):
        raise ValueError(
            f"offset: expected shape (N, 2*G*kh*kw, Ho, Wo) with size(1) a multiple of {2 * taps}, "
            f"got {tuple(offset.shape)}"
        )
    deform_groups = offset.shape[1] // (2 * taps)
    if channels % deform_groups:
        raise ValueError(
            f"offset: its {deform_groups} deformable groups must divide input's {channels} "
            f"channels, got {tuple(offset.shape)}"
        )
    if bias is not None:
        check_beside("bias", bias, input, float32_too=False)
        check_shape("bias", bias, (weight.shape[0],), "(O,)")
    if mask is not None:
        check_beside("mask", mask, input, float32_too=True)


def _output_size(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    height, width = (
        (input.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1)
        // stride[i]
        + 1
        for i in range(2)
    )
    return height, width


@torch.library.register_fake("d2_deform::deform_conv2d")
def _fake(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    *geometry: int,
) -> Tensor:
    size = _output_size(input, weight, geometry[0:2], geometry[2:4], geometry[4:6])
    return empty_beside(input, (input.shape[0], weight.shape[0], *size))


@torch.library.register_fake("d2_deform::deform_conv2d_backward")
def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    *rest: int,
) -> tuple[Tensor, ...]:
    need_input, need_offset, need_weight, need_bias, need_mask, _ = rest[6:]
    return (
        empty_beside(input, input.shape) if need_input else input.new_empty(0),
        offset.new_empty(offset.shape if need_offset else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        input.new_empty(weight.shape[0] if need_bias else 0),
        mask.new_empty(mask.shape) if need_mask and mask is not None else offset.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, offset, weight, _, mask, *geometry = inputs
    ctx.save_for_backward(input, offset, weight, mask)
    ctx.geometry = geometry


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, offset, weight, mask = ctx.saved_tensors
    needs = ctx.needs_input_grad[:5]  # input, offset, weight, bias, mask, as the operator has them
    grads = torch.ops.d2_deform.deform_conv2d_backward(
        grad_output,
        input,
        offset,
        weight,
        mask,
        *ctx.geometry,
        *needs,
        torch.are_deterministic_algorithms_enabled(),
    )
    asked = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    return (*asked, *(None,) * 6)


torch.library.register_autograd("d2_deform::deform_conv2d", _backward, setup_context=_setup_context)
register_no_double_backward("deform_conv2d_backward")
