"""Layers that start at zero, as every offset branch does (paper section 3, "zero weights")."""

from torch import nn

__all__ = ["ZeroConv2d", "ZeroLinear"]


class ZeroConv2d(nn.Conv2d):
    """``nn.Conv2d`` whose weight and bias start at zero.

    It draws no random number, so under one seed the rest of a network starts with the same weights
    with and without it.
    """

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ZeroLinear(nn.Linear):
    """``nn.Linear`` whose weight and bias start at zero; it draws no random number either."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
