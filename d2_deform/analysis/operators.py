"""Handles by which fvcore counts the compiled operators; the rule: :mod:`d2_deform.ops.flops`."""

from collections.abc import Callable
from typing import Any

from fvcore.nn.jit_handles import generic_activation_jit, get_shape

from d2_deform.ops.flops import convolution_flops, pooling_flops

__all__ = ["ACTIVATION_HANDLES", "FLOP_HANDLES"]

Handle = Callable[[list[Any], list[Any]], Any]


def _deform_conv2d_handle(inputs: list[Any], outputs: list[Any]) -> int:
    input, weight, output = get_shape(inputs[0]), get_shape(inputs[2]), get_shape(outputs[0])
    return convolution_flops(input, weight, output)


def _pooling_handle(position_of_sampling_ratio: int) -> Handle:
    def handle(inputs: list[Any], outputs: list[Any]) -> int:
        return pooling_flops(get_shape(outputs[0]), inputs[position_of_sampling_ratio].toIValue())

    return handle


FLOP_HANDLES: dict[str, Handle] = {
    "d2_deform::deform_conv2d": _deform_conv2d_handle,
    "d2_deform::deform_roi_pool": _pooling_handle(6),
    "d2_deform::deform_ps_roi_pool": _pooling_handle(7),
}
"""For ``fvcore.nn.FlopCountAnalysis(...).set_op_handle(**FLOP_HANDLES)``."""

ACTIVATION_HANDLES: dict[str, Handle] = {name: generic_activation_jit() for name in FLOP_HANDLES}
"""For ``fvcore.nn.ActivationCountAnalysis``: the elements of the output, as for a convolution."""
