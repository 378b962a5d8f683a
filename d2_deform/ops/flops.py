"""What the operators compute: FLOPs, for fvcore and for PyTorch's ``FlopCounterMode``.

One rule for all: a multiply-add is one FLOP, as fvcore and Detectron2 count convolutions, and a
bilinear sample is four (its four cells times their weights).

- ``deform_conv2d``: those of the convolution, N * Ho * Wo * weight.numel(), and 4 for each of its
  N * C * kh * kw * Ho * Wo samples. The mask of the modulated operator is part of the weights of
  the four cells and not counted, as their computation from the offsets is not.
- ``deform_roi_pool``, ``deform_ps_roi_pool``: 4 for each sample, ``sampling_ratio**2`` for each
  element of the output; samples outside the map, which are skipped, are counted.

PyTorch's ``FlopCounterMode`` has two FLOPs for a multiply-add. Importing ``d2_deform.ops`` teaches
it the operators and their backward passes, for which it would count zero without a word:

    >>> with torch.utils.flop_counter.FlopCounterMode() as counter:
    >>>     sum(model(batch).values()).backward()
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import _library  # noqa: F401  loads the operators

__all__ = ["convolution_flops", "pooling_flops"]

Shape = Sequence[int]

FLOPS_PER_SAMPLE = 4
_ops = torch.ops.d2_deform


def convolution_flops(input: Shape, weight: Shape, output: Shape) -> int:
    """Multiply-adds of ``deform_conv2d``, by the shapes of its tensors."""
    return _products(weight, output) + _sampling(input, weight, output)


def pooling_flops(output: Shape, sampling_ratio: int) -> int:
    """Multiply-adds of either RoI pooling, by the shape of its output."""
    return FLOPS_PER_SAMPLE * sampling_ratio**2 * prod(output)


def _products(weight: Shape, output: Shape) -> int:
    return output[0] * prod(output[2:]) * prod(weight)


def _sampling(input: Shape, weight: Shape, output: Shape) -> int:
    taps = prod(weight[2:])
    return FLOPS_PER_SAMPLE * output[0] * input[1] * taps * prod(output[2:])


@register_flop_formula(_ops.deform_conv2d)
def _deform_conv2d(
    input: Shape, offset: Shape, weight: Shape, *rest: Any, out_shape: Shape, **kwargs: Any
) -> int:
    return 2 * convolution_flops(input, weight, out_shape)


@register_flop_formula(_ops.deform_conv2d_backward)
def _deform_conv2d_backward(
    grad_output: Shape, input: Shape, offset: Shape, weight: Shape, *rest: Any, **kwargs: Any
) -> int:
    """One matrix product for the columns, one for the weight, one pass over the samples each."""
    need_input, need_offset, need_weight, _, need_mask, _ = rest[-6:]
    products = (need_input or need_offset or need_mask) + need_weight
    passes = need_input + (need_offset or need_mask) + need_weight
    return 2 * (
        products * _products(weight, grad_output) + passes * _sampling(input, weight, grad_output)
    )


@register_flop_formula([_ops.deform_roi_pool, _ops.deform_ps_roi_pool])
def _pooling(*args: Any, out_shape: Shape, **kwargs: Any) -> int:
    sampling_ratio = args[-3]
    return 2 * pooling_flops(out_shape, sampling_ratio)


@register_flop_formula([_ops.deform_roi_pool_backward, _ops.deform_ps_roi_pool_backward])
def _pooling_backward(grad_output: Shape, *rest: Any, **kwargs: Any) -> int:
    sampling_ratio, _, _, need_input, need_offset, _ = rest[-6:]
    return 2 * (need_input + need_offset) * pooling_flops(grad_output, sampling_ratio)
