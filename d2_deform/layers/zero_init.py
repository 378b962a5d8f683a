"""What every offset branch ends with: layers that start at zero and compute outside autocast."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from d2_deform.ops._arguments import under_autocast

__all__ = ["ZeroConv2d", "ZeroLinear", "outside_autocast"]


def outside_autocast(
    function: Callable[..., Tensor], dtype: torch.dtype, *tensors: Tensor
) -> Tensor:
    """``function(*tensors)``; where autocast is on, with it off and the tensors in ``dtype``."""
    device_type = tensors[0].device.type
    if not under_autocast(device_type):
        return function(*tensors)
    with torch.autocast(device_type, enabled=False):
        return function(*(tensor.to(dtype) for tensor in tensors))


class ZeroConv2d(nn.Conv2d):
    """``nn.Conv2d`` whose weight and bias start at zero (paper section 3, "zero weights").

    It draws no random number, so under one seed the rest of a network starts with the same weights
    with and without it.

    Under autocast it computes in its weight's type, float32: bfloat16 has 8 bits, so that offsets
    of 8 to 16 cells would be sixteenths of a cell apart.
    """

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return outside_autocast(super().forward, self.weight.dtype, input)


class ZeroLinear(nn.Linear):
    """``nn.Linear`` that starts and computes as :class:`ZeroConv2d` does."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return outside_autocast(super().forward, self.weight.dtype, input)
