"""What deformable RoI pooling and its position-sensitive kind share: checks, gradients."""

import math
from typing import Any

import torch
from torch import Tensor

from ._arguments import (
    check_beside,
    check_count,
    check_shape,
    empty_beside,
    register_no_double_backward,
)

MOST_SAMPLES = 1 << 16


def check_pooling(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: tuple[int, int],
    out_channels: int,
    spatial_scale: float,
    sampling_ratio: int,
) -> None:
    """Raises TypeError or ValueError, naming the argument, unless the kernels can run."""
    check_beside("rois", rois, input, float32_too=True)
    if rois.dim() != 2 or rois.shape[1] != 5:
        raise ValueError(
            f"rois: expected shape (R, 5) = (batch index, x1, y1, x2, y2), got {tuple(rois.shape)}"
        )
    if not 0 < spatial_scale < math.inf:
        raise ValueError(f"spatial_scale: expected a finite number above 0, got {spatial_scale!r}")
    check_count("sampling_ratio", sampling_ratio, 1)
    if sampling_ratio > MOST_SAMPLES:
        raise ValueError(f"sampling_ratio: expected at most {MOST_SAMPLES}, got {sampling_ratio}")
    if offset is None:
        return
    check_beside("offset", offset, input, float32_too=True)
    if offset.dim() != 4 or offset.shape[1] == 0 or offset.shape[1] % 2:
        raise ValueError(f"offset: expected shape (R, 2*K, Ph, Pw), got {tuple(offset.shape)}")
    if out_channels % (offset.shape[1] // 2):
        raise ValueError(
            f"offset: its K = {offset.shape[1] // 2} groups must divide the {out_channels} output "
            f"channels, got {tuple(offset.shape)}"
        )
    expected = (rois.shape[0], offset.shape[1], *output_size)
    check_shape("offset", offset, expected, "(R, 2*K, Ph, Pw)")


def register_pooling_gradients(name: str) -> None:
    """Registers how the pooling operator ``name`` is differentiated, by ``<name>_backward``.

    Both have the arguments input, rois, offset; then the forward operator has the output's two
    sizes, and both end with the same rule.
    """
    backward_operator = f"{name}_backward"

    def fake_backward(
        grad_output: Tensor, input: Tensor, rois: Tensor, offset: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        need_input, need_offset, _ = rest[-3:]
        return (
            empty_beside(input, input.shape) if need_input else input.new_empty(0),
            torch.empty_like(offset, memory_format=torch.contiguous_format)
            if need_offset and offset is not None
            else rois.new_empty(0),
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, rois, offset, _, _, *rule = inputs
        ctx.save_for_backward(input, rois, offset)
        ctx.rule = rule

    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        need_input, _, need_offset = ctx.needs_input_grad[:3]
        operator = getattr(torch.ops.d2_deform, backward_operator)
        grad_input, grad_offset = operator(
            grad_output,
            *ctx.saved_tensors,
            *ctx.rule,
            need_input,
            need_offset,
            torch.are_deterministic_algorithms_enabled(),
        )
        no_gradients = (None,) * (2 + len(ctx.rule))
        return (
            grad_input if need_input else None,
            None,
            grad_offset if need_offset else None,
            *no_gradients,
        )

    torch.library.register_fake(f"d2_deform::{backward_operator}", fake_backward)
    torch.library.register_autograd(f"d2_deform::{name}", backward, setup_context=setup_context)
    register_no_double_backward(backward_operator)
