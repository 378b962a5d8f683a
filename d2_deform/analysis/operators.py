"""What the compiled operators compute: FLOPs and activations, for fvcore and for PyTorch.

One rule for all: a multiply-add is one FLOP, as fvcore and Detectron2 count convolutions, and a
bilinear sample is four (its four cells times their weights).

- ``deform_conv2d``: those of the convolution, N * Ho * Wo * weight.numel(), and 4 for each of its
  N * C * kh * kw * Ho * Wo samples. The mask of the modulated operator is part of the weights of
  the four cells and not counted, as their computation from the offsets is not.
- ``deform_roi_pool``, ``deform_ps_roi_pool``: 4 for each sample, ``sampling_ratio**2`` for each
  element of the output; samples outside the map, which are skipped, are counted.

PyTorch's ``FlopCounterMode`` has two FLOPs for a multiply-add. Importing this package teaches it
the operators and their backward passes, for which it would count zero without a word:

    >>> import d2_deform.analysis
    >>> with torch.utils.flop_counter.FlopCounterMode() as counter:
    >>>     sum(model(batch).values()).backward()
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from fvcore.nn.jit_handles import generic_activation_jit, get_shape
from torch.utils.flop_counter import register_flop_formula

import d2_deform.ops  # noqa: F401  loads the operators

__all__ = ["ACTIVATION_HANDLES", "FLOP_HANDLES"]

Handle = Callable[[list[Any], list[Any]], Any]
Shape = Sequence[int]

FLOPS_PER_SAMPLE = 4
_ops = torch.ops.d2_deform


def _convolution(weight: Shape, output: Shape) -> int:
    return output[0] * prod(output[2:]) * prod(weight)


def _convolution_sampling(input: Shape, weight: Shape, output: Shape) -> int:
    taps = prod(weight[2:])
    return FLOPS_PER_SAMPLE * output[0] * input[1] * taps * prod(output[2:])


def _pooling(output: Shape, sampling_ratio: int) -> int:
    return FLOPS_PER_SAMPLE * sampling_ratio**2 * prod(output)


def _deform_conv2d_handle(inputs: list[Any], outputs: list[Any]) -> int:
    input, weight, output = get_shape(inputs[0]), get_shape(inputs[2]), get_shape(outputs[0])
    return _convolution(weight, output) + _convolution_sampling(input, weight, output)


def _pooling_handle(position_of_sampling_ratio: int) -> Handle:
    def handle(inputs: list[Any], outputs: list[Any]) -> int:
        return _pooling(get_shape(outputs[0]), inputs[position_of_sampling_ratio].toIValue())

    return handle


FLOP_HANDLES: dict[str, Handle] = {
    "d2_deform::deform_conv2d": _deform_conv2d_handle,
    "d2_deform::deform_roi_pool": _pooling_handle(6),
    "d2_deform::deform_ps_roi_pool": _pooling_handle(7),
}
"""For ``fvcore.nn.FlopCountAnalysis(...).set_op_handle(**FLOP_HANDLES)``."""

ACTIVATION_HANDLES: dict[str, Handle] = {name: generic_activation_jit() for name in FLOP_HANDLES}
"""For ``fvcore.nn.ActivationCountAnalysis``: the elements of the output, as for a convolution."""


@register_flop_formula(_ops.deform_conv2d)
def _deform_conv2d_flop(
    input: Shape, offset: Shape, weight: Shape, *rest: Any, out_shape: Shape, **kwargs: Any
) -> int:
    return 2 * (_convolution(weight, out_shape) + _convolution_sampling(input, weight, out_shape))


@register_flop_formula(_ops.deform_conv2d_backward)
def _deform_conv2d_backward_flop(
    grad_output: Shape, input: Shape, offset: Shape, weight: Shape, *rest: Any, **kwargs: Any
) -> int:
    """One matrix product for the columns, one for the weight, one pass over the samples each."""
    need_input, need_offset, need_weight, _, need_mask, _ = rest[-6:]
    products = (need_input or need_offset or need_mask) + need_weight
    passes = need_input + (need_offset or need_mask) + need_weight
    return 2 * (
        products * _convolution(weight, grad_output)
        + passes * _convolution_sampling(input, weight, grad_output)
    )


@register_flop_formula([_ops.deform_roi_pool, _ops.deform_ps_roi_pool])
def _pooling_flop(*args: Any, out_shape: Shape, **kwargs: Any) -> int:
    sampling_ratio = args[-3]
    return 2 * _pooling(out_shape, sampling_ratio)


@register_flop_formula([_ops.deform_roi_pool_backward, _ops.deform_ps_roi_pool_backward])
def _pooling_backward_flop(grad_output: Shape, *rest: Any, **kwargs: Any) -> int:
    sampling_ratio, _, _, need_input, need_offset, _ = rest[-6:]
    return 2 * (need_input + need_offset) * _pooling(grad_output, sampling_ratio)
